"""Does a premise entail a claim? The judges that grounding scores ask.

A judge is any function `judge(premise, claim) -> bool`. One that has `many(pairs)` is given all its
pairs at once. A judge's `prefix` stands before the names of the scores that were made with it, so
that what is not an NLI model's verdict cannot be taken for one.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cosup_jax.errors import UserError
from cosup_jax.evaluation.text import normalize_answer

Judge = Callable[[str, str], bool]
Pair = tuple[str, str]  # premise, claim


def entailed(judge: Judge, pairs: Iterable[Pair]) -> dict[Pair, bool]:
    """The judge's verdict on each distinct pair."""
    distinct = list(dict.fromkeys(pairs))
    if hasattr(judge, "many"):
        verdicts = judge.many(distinct)
    else:
        verdicts = [judge(premise, claim) for premise, claim in distinct]
    return {pair: bool(verdict) for pair, verdict in zip(distinct, verdicts, strict=True)}


def labelled(judge: Judge, scores: dict[str, float]) -> dict[str, float]:
    """The scores under names that tell what judged them."""
    prefix = getattr(judge, "prefix", "")
    return {prefix + name: score for name, score in scores.items()}


def judge_named(name: str) -> Judge:
    """`containment`, or the NLI model of this name. Raises UserError if that cannot be read."""
    return Containment() if name == "containment" else TransformersNli(name)


def prefix_of(name: str) -> str:
    """That of `judge_named(name)`, whose model is not read."""
    return Containment.prefix if name == "containment" else TransformersNli.prefix


def version_of(name: str, config: Any) -> str:
    """Tells a model's files from those that had its name before: of a directory the sizes and times
    of its files, of the hub the commit that `config` (transformers') comes from."""
    if not Path(name).is_dir():
        return str(getattr(config, "_commit_hash", ""))
    files = [path for path in sorted(Path(name).iterdir()) if path.is_file()]
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


class Containment:
    """No NLI: a claim is contained if each of its normalised tokens occurs in the premise.

    Deterministic and blind to order and meaning. A claim without tokens is not contained.
    """

    prefix = "containment_"

    def __call__(self, premise: str, claim: str) -> bool:
        tokens = set(normalize_answer(claim).split())
        return bool(tokens) and tokens <= set(normalize_answer(premise).split())


class TransformersNli:
    """An NLI model by hub id or directory. Needs torch (the parity extra).

    An encoder-decoder reads `premise: {premise} hypothesis: {claim}` whole and entails if it writes
    "1", as google/t5_xxl_true_nli_mixture does. A sequence classifier reads the pair, and entails
    if the likeliest of its labels is "entailment"; of a pair beyond its context the longer text is
    cut, which `cut` counts. A pair is judged once and remembered.
    """

    prefix = ""

    def __init__(
        self, name_or_path: str, batch_size: int = 8, dtype: str = "auto", device: str = "cpu"
    ):
        self.name = str(name_or_path)
        self.batch_size = batch_size
        self.cut = 0  # pairs that were too long to be read whole
        self._verdicts: dict[Pair, bool] = {}
        self._load(dtype, device)

    def __call__(self, premise: str, claim: str) -> bool:
        return self.many([(premise, claim)])[0]

    def many(self, pairs: Sequence[Pair]) -> list[bool]:
        """One verdict a pair, in order."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._verdicts]
        new.sort(key=lambda pair: len(pair[0]) + len(pair[1]))  # rows of a batch alike in length
        starts = range(0, len(new), self.batch_size)
        for start in tqdm(starts, desc="NLI", unit="batch", disable=None, leave=False):
            batch = new[start : start + self.batch_size]
            self._verdicts.update(zip(batch, self._judge(batch), strict=True))
        return [self._verdicts[pair] for pair in pairs]

    def _load(self, dtype: str, device: str) -> None:
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(self.name, trust_remote_code=False)
            if importlib.util.find_spec("torch") is None:
                raise UserError(
                    f"the NLI model {self.name} needs torch: pip install 'cosup_jax[parity]'"
                )
            self.version = version_of(self.name, config)
            self._writes = config.is_encoder_decoder and not any(
                "SequenceClassification" in name for name in config.architectures or ()
            )
            kind = "Seq2SeqLM" if self._writes else "SequenceClassification"
            auto = getattr(transformers, f"AutoModelFor{kind}")
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.name, trust_remote_code=False
            )
            self._model = auto.from_pretrained(self.name, dtype=dtype, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:  # each kind of damage has a class of its own
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the NLI model {self.name} cannot be read: {first}; name a hub id or a directory "
                "of transformers' files"
            ) from error
        self._model.eval().requires_grad_(False).to(device)
        if not self._writes:
            self._label = self._entailment(config)

    def _entailment(self, config) -> int:
        found = [i for i, label in config.id2label.items() if label.lower() == "entailment"]
        if len(found) != 1:
            raise UserError(
                f"the NLI model {self.name} has no label called entailment, only "
                f"{', '.join(config.id2label.values())}: name a model made for NLI"
            )
        return int(found[0])

    def _judge(self, batch: Sequence[Pair]) -> list[bool]:
        premises, claims = zip(*batch, strict=True)
        if self._writes:
            texts = [f"premise: {premise} hypothesis: {claim}" for premise, claim in batch]
            inputs = self._tokenizer(texts, padding=True, return_tensors="pt")
            written = self._model.generate(
                **inputs.to(self._model.device), max_new_tokens=10, do_sample=False, num_beams=1
            )
            answers = self._tokenizer.batch_decode(written, skip_special_tokens=True)
            return [answer == "1" for answer in answers]
        length = self._context()
        self.cut += sum(len(ids) > length for ids in self._tokenizer(premises, claims)["input_ids"])
        inputs = self._tokenizer(
            premises,
            claims,
            padding=True,
            truncation="longest_first",
            max_length=length,
            return_tensors="pt",
        )
        logits = self._model(**inputs.to(self._model.device)).logits
        return [int(label) == self._label for label in logits.argmax(-1)]

    def _context(self) -> int:
        """Tokens that the model has positions for: RoBERTa's begin behind its padding's."""
        limit = getattr(self._model.config, "max_position_embeddings", None)
        embeddings = getattr(self._model.base_model, "embeddings", None)
        table = getattr(embeddings, "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        limit = limit if padding is None or limit is None else limit - padding - 1
        return min(self._tokenizer.model_max_length, limit or self._tokenizer.model_max_length)
