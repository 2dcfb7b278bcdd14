"""--mode=generate: cited answers to a file of questions, or at a prompt.

A line of the questions' file is an object with `question`; `id`, `task`, `answers`, `evidence` and
`candidates` are as in a data set, `max_tokens` and `max_retrievals` lower the config's; all of them
may be left out.
"""

import dataclasses
import hashlib
import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from cosup_jax import assemble
from cosup_jax.answer import cited, records
from cosup_jax.answer import pair as pair_lib
from cosup_jax.answer.decode import Budget, Decoder, Retriever
from cosup_jax.answer.library import Library
from cosup_jax.answer.pair import Pair
from cosup_jax.answer.retrieve import Candidates, Gold, Lexical, Search, Separate, Wrong
from cosup_jax.assemble import Trained
from cosup_jax.config import Config, GenerateConfig
from cosup_jax.data import markup
from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.rows import Row, existing, read_lines
from cosup_jax.data.schema import Example
from cosup_jax.errors import UserError
from cosup_jax.report.answers import stretches
from cosup_jax.runtime.bucket import is_url
from cosup_jax.runtime.paths import expanded
from cosup_jax.runtime.workdir import Workdir, writing
from cosup_jax.wording import counted

BY_QUESTION = ("candidates", "gold", "wrong")  # arms that need more of it than its words
NO_DIFFERENCE = ("examples", "batch_size", "chunk_tokens", "retriever")  # change no answer as such
FIELDS = (*(f.name for f in dataclasses.fields(Example)), "max_tokens", "max_retrievals")
UNDERLINED = ("\033[4m", "\033[0m")  # in a terminal


def generate(config: Config, workdir: str, questions: str = "", output: str = "") -> None:
    """Answers all questions of a file, or those typed in.

    Args:
      questions: JSONL; empty: a prompt.
      output: JSONL, one line an answer, written as they come, so that a run that was killed goes
        on; empty: WORKDIR/answers/, under the name of the questions' file.

    Raises:
      UserError: no checkpoint of this config, a bad line, or an output of something else.
    """
    arm = config.generate.retrieval
    pair_lib.check(config, [arm])
    if jax.process_count() > 1:
        raise UserError("--mode=generate runs in one process; start it on one host")
    if output and not questions:
        raise UserError(f"--output={output} means nothing at a prompt; give --questions=FILE too")
    if is_url(output):
        raise UserError(f"--output={output}: answers are written to a local file; give its path")
    if arm in BY_QUESTION and not questions:
        raise UserError(f"config.generate.retrieval={arm} needs --questions=FILE, which names them")
    asked = read_questions(questions, config.generate) if questions else []
    with Workdir(workdir, begun=True) as directory:
        if arm != "none":
            directory.fetch(pair_lib.PLACE if config.generate.retriever else "index")
        trained = assemble.trained(config, directory.path)
        most = 0 if questions else 1
        pair = Pair.of(trained, directory.path, most)
        shelved = pair.library if pair else lambda: Library.of(trained, directory.path)
        library = None if arm == "none" else shelved()
        writer = Writer(trained, library, most, pair)
        if questions:
            default = directory.path / "answers" / f"{Path(questions).stem}.jsonl"
            _answer_file(expanded(output) if output else default, asked, writer)
    if not questions:  # the workdir is free while somebody thinks of one
        converse(writer)


@dataclasses.dataclass(frozen=True)
class Question(Example):
    """With its budget."""

    budget: Budget = dataclasses.field(kw_only=True)


def read_questions(name: str, settings: GenerateConfig) -> list[Question]:
    """Of a file. Raises UserError for the first bad line, and for an id that is given twice."""
    problems, found = Problems(), {}
    for row in read_lines(existing(name, "check --questions"), problems):
        try:
            example = _question(row, settings)
            if example.id in found:
                raise BadRow("duplicate_id", f"an earlier line has the id {example.id!r}")
            found[example.id] = example
        except BadRow as error:
            problems.add(error.kind, row.where, row.id, error.reason)
    if problems.errors:
        raise UserError(f"{problems.first_error} (first of {counted(problems.errors, 'bad line')})")
    return list(found.values())


def _question(row: Row, settings: GenerateConfig) -> Question:
    for name, near in row.misspelt(FIELDS):
        if near not in row.fields:
            raise BadRow("missing_field", f"{name!r} means nothing; did you mean {near!r}?")
    return Question(
        id=row.key("id", default=row.where.rpartition(":")[2]),
        task=row.text("task", default="open_qa"),
        question=row.text("question"),
        answers=row.texts("answers", default=()),
        evidence=row.texts("evidence", default=()),
        candidates=row.texts("candidates", default=()),
        budget=Budget(
            _limit(row, "max_tokens", 1, settings), _limit(row, "max_retrievals", 0, settings)
        ),
    )


def _limit(row: Row, name: str, least: int, settings: GenerateConfig) -> int:
    most = getattr(settings, name)
    found = row.whole(name, default=most)
    if not least <= found <= most:
        allowed = f"must be {least} to {most}, as config.generate.{name} allows"
        raise BadRow("wrong_type", f"'{name}' {allowed}, not {found}")
    return found


class Writer:
    """Records of answers, by one arm."""

    def __init__(
        self,
        trained: Trained,
        library: Library | None,
        most: int = 0,
        pair: Pair | None = None,
    ):
        """`most` questions at once instead of generate.batch_size; `pair` has made `library`."""
        self.trained, self.library, self.pair = trained, library, pair
        self._settings, self._tokenizer = trained.config.generate, trained.tokenizers.gen
        parts = (trained.mesh, trained.towers, trained.config, self._tokenizer)
        self.decoder = Decoder(*parts, most)

    def answers(self, examples: Sequence[Question]) -> Iterator[dict[str, Any]]:
        """As files have them, in order. Raises UserError for a passage that is not there."""
        if not examples:
            return
        retriever = self._retriever(examples)  # before anything is compiled
        prompts = [markup.prompt(example, self._tokenizer) for example in examples]
        budgets = [example.budget for example in examples]
        found = self.decoder.answers(self.trained.params, prompts, retriever, budgets)
        passages = retriever.passages if retriever else ()
        longest = self.trained.config.data.max_ctx_tokens
        for example, answer in zip(examples, found, strict=True):
            yield cited.record(example, answer, passages, self._tokenizer, longest)

    def _retriever(self, examples: Sequence[Example]) -> Retriever | None:
        library, arm, pair = self.library, self._settings.retrieval, self.pair
        named = lambda field: [library.rows(example, field) for example in examples]
        if arm == "none":
            return None
        if arm == "gold":
            return Gold(library.passages, named("evidence"))
        if arm == "wrong":
            return Wrong(library.passages, examples, named("evidence"))
        if arm == "bm25":
            words, each = [e.question for e in examples], self._settings.passages
            return Lexical(library.passages, library.bm25, words, each)
        if arm == "candidates":
            own = Candidates(library.passages, library.vectors, named("candidates"))
        else:
            own = Search(library.passages, library.vectors, self.trained.mesh)
        return Separate(pair.queries, own) if pair else own


def _answer_file(path: Path, asked: Sequence[Question], writer: Writer) -> None:
    run = _run(asked, writer)
    _check_output(path, run)
    with records.Answers(path, run) as answers:
        todo = [example for example in asked if example.id not in answers.known]
        done, started, stopped = len(asked) - len(todo), time.perf_counter(), Counter()
        if done:
            print(f"{done} of {len(asked)} answers are in {path} already", flush=True)
        bar = tqdm(total=len(asked), initial=done, unit="question", disable=None, leave=False)
        tokens = retrievals = 0
        with bar:
            for record in writer.answers(todo):
                answers.add(record)
                bar.update()
                tokens, retrievals = tokens + record["tokens"], retrievals + record["retrievals"]
                stopped[record["stopped"]] += 1
    if todo:
        seconds = time.perf_counter() - started
        print(
            f"{counted(len(todo), 'answer')} in {seconds:.1f} s, compilation included: "
            f"{retrievals / len(todo):.2f} retrievals and {tokens / len(todo):.1f} tokens each; "
            f"stopped by {', '.join(f'{why} {count}' for why, count in stopped.most_common())}; "
            f"{len(writer.decoder.compiled)} compiled shapes: {', '.join(writer.decoder.compiled)}"
        )
    print(f"done: {path}", flush=True)


def _run(asked: Sequence[Question], writer: Writer) -> str:
    """Digest of all that an answer depends on."""
    trained, library = writer.trained, writer.library
    settings = dataclasses.asdict(trained.config.generate)
    decides = {
        "contract": trained.contract.to_dict(),
        "gen": dataclasses.asdict(trained.config.gen),
        "settings": {k: v for k, v in settings.items() if k not in NO_DIFFERENCE},
        "passages": library.version if library else "",
        "questions": [dataclasses.asdict(example) for example in asked],
    }
    if writer.pair:
        decides["retriever"] = writer.pair.decides
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _check_output(path: Path, run: str) -> None:
    """Raises UserError for a file that this run has not begun."""
    if not path.exists():
        return
    with writing(path):  # which begins with reading it
        ours = records.all_of(path, run)
    if not ours:
        raise UserError(
            f"{path} holds something else than answers to these questions by this model, corpus "
            "and settings; give another --output, or move it away"
        )


def converse(writer: Writer) -> None:
    """Reads questions line by line until there are no more, and prints each answer."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # what is typed may be no UTF-8
    shown, settings = sys.stdout.isatty(), writer.trained.config.generate
    budget = Budget(settings.max_tokens, settings.max_retrievals)
    while True:
        try:
            question = input("question> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question:
            asked = Question("1", "open_qa", question, (), (), budget=budget)
            (record,) = writer.answers([asked])
            print(told(record, UNDERLINED if shown else ("<<", ">>")), flush=True)


def told(record: Mapping[str, Any], marks: tuple[str, str]) -> str:
    """An answer with its numbered sources, the grounded spans in them between `marks`."""
    reasons = {
        "prompt": "The question leaves no room for an answer (config.generate.context_tokens).",
        "context": "(cut off: config.generate.context_tokens)",
        "tokens": "(cut off: config.generate.max_tokens)",
    }
    said = " ".join(filter(None, (record["output"].strip(), reasons.get(record["stopped"]))))
    lines = [said or "(empty answer)"]
    scores = {found["number"]: found["score"] for found in reversed(record["retrieved"])}
    for source in record["sources"]:
        number = source["number"]
        spans = [span["text"] for span in record["spans"] if span["number"] == number]
        pieces, _ = stretches(source["text"], spans)
        text = "".join(piece.join(marks) if grounded else piece for piece, grounded in pieces)
        score = "" if scores[number] is None else f"  ({scores[number]:.3f})"
        lines.append(f"  [{number}] {source['title'] or source['id']}{score}")
        lines += textwrap.wrap(text, 96, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
