"""Writes goldens/metrics.json: what the peers' own scorers say of made-up texts and records.

Run by hand: `python tests/record_metrics.py KILT ALCE OFFICIAL` with checkouts of
facebookresearch/KILT, princeton-nlp/ALCE and
kaistAI/Semiparametric_Token-Sequence_Co-Supervision, and the package rouge 1.0.1 installed. With a
number in front, nothing is written: so many other cases a suite are compared with ours.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import random
import sys
import textwrap
import types
from pathlib import Path
from unittest.mock import MagicMock

import metric_cases as cases

from cosup_jax.evaluation.sentences import sentences

GOLDEN = Path(__file__).parent / "goldens" / "metrics.json"


def load(name: str, path: Path, **replaced) -> types.ModuleType:
    """A file of a peer's, its heavy imports replaced while it is imported."""
    stubs = {"torch": MagicMock(), "transformers": MagicMock(), "nltk": MagicMock(), **replaced}
    before = {stub: sys.modules.get(stub) for stub in stubs}
    sys.modules.update(stubs)
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    for stub, old in before.items():
        sys.modules.pop(stub)
        if old is not None:
            sys.modules[stub] = old
    if hasattr(loaded, "sent_tokenize"):
        loaded.sent_tokenize = sentences
        loaded._run_nli_autoais = lambda premise, claim: int(cases.nli(premise, claim))
        loaded.autoais_model = object()
        loaded.tqdm = lambda each: each
    return loaded


class Peers:
    """Their functions, each taking a case and giving what ours of that suite gives."""

    def __init__(self, kilt: Path, alce: Path, official: Path):
        importlib.import_module("rouge_score.rouge_scorer")  # before nltk is replaced

        sys.path.insert(0, str(kilt))
        sys.modules["kilt.kilt_utils"] = MagicMock()
        from kilt import eval_downstream, eval_retrieval

        self.downstream, self.retrieval = eval_downstream, eval_retrieval
        self.utils = load("alce_utils", alce / "utils.py")
        self.alce_code = load("alce_eval", alce / "eval.py", utils=self.utils)
        package = types.ModuleType("utils")
        self.official_code = load(
            "official_eval",
            official / "eval_metric.py",
            **{"utils": package, "utils.alce_utils": self.utils},
        )
        logging.disable()
        source = (official / "run_inference_ntp_nsp.py").read_text()
        start = source.index("ret_index = [")
        start = source.rindex("\n", 0, start) + 1
        stop = source.index('item["output"] = new_text', start)
        self.parser = compile(textwrap.dedent(source[start:stop]), "parser", "exec")

    def text(self, case: dict) -> dict:
        gold = {"id": 1, "output": [{"answer": answer} for answer in case["answers"]]}
        guess = {"id": 1, "output": [{"answer": case["prediction"]}]}
        return self.downstream._calculate_metrics([gold], [guess])["downstream"]

    def string(self, case: dict) -> str:
        normalized = self.downstream.normalize_answer(case["text"])
        assert normalized == self.utils.normalize_answer(case["text"])
        return normalized + "\n" + self.utils.remove_citations(case["text"])

    def kilt(self, case: dict) -> dict:
        records = self.downstream.validate_input(case["gold"], case["guess"])
        found = self.downstream._calculate_metrics(*records)
        return {
            **found["downstream"],
            **found["kilt"],
            **self.retrieval.compute(*records, ks=[1, 2, 5], rank_keys=["wikipedia_id"]),
        }

    def alce(self, case: dict) -> dict:
        code, items = self.alce_code, copy.deepcopy(case["items"])
        for item in items:
            item["output"] = item["output"].strip().split("\n")[0].replace("<|im_end|>", "")
        plain = copy.deepcopy(items)
        for item in plain:
            item["output"] = self.utils.remove_citations(item["output"])
        found = dict(zip(("str_em", "str_hit"), code.compute_str_em(plain), strict=True))
        found |= code.compute_qampari_f1(plain)
        found |= {f"cot_{n}": v for n, v in code.compute_qampari_f1(plain, cot=True).items()}
        found |= code.compute_autoais(items, at_most_citations=3)
        lists = code.compute_autoais(items, qampari=True, at_most_citations=3)
        found |= {f"list_{name}": value for name, value in lists.items()}
        found["claims_nli"] = code.compute_claims(plain)
        for number, item in enumerate(plain):  # of one item the bootstrap is the score
            found[f"rougeLsum_{number}"] = code.compute_rouge([item])
        return found

    def parse(self, case: dict) -> str:
        raw = case["raw"]
        for mark in ("## Raw Output:\n\n", "## Output:\n\n"):
            if mark in raw:
                raw = raw.split(mark)[1]
                break
        names = {"text": raw, "re": __import__("re")}
        exec(self.parser, names)
        return names["new_text"]

    def official(self, case: dict) -> dict:
        """Its main for one file, without what official.py leaves out."""
        code, name, items = self.official_code, case["data_name"], copy.deepcopy(case["items"])
        for item in items:
            item["output"] = item["output"].replace("\n", " ")
            for junk in ("<|im_end|>", "<PAD>", "</s>", "[RELEVANT]"):
                item["output"] = item["output"].replace(junk, "")
        plain = copy.deepcopy(items)
        for item in plain:
            item["output"] = self.utils.remove_citations(item["output"])
        found = {"length": code.compute_len(plain)}
        if name == "kilt_nq":
            found["rev.support_em"], items, found["rev.support_prec"], precision = (
                code.revised_compute_ref_support(items)
            )
        else:
            f1, em, exist, _, items, recall, prec, _, precision = code.compute_ref_support(items)
            found |= {"support_f1": f1, "support_em": em, "support_exist": exist}
            found |= {"support_recall": recall, "support_prec": prec}
        for prefix, raw in (("", False), ("raw.", True)):
            right, _, _, split = code.compute_qa_single(plain, name, precision, raw, False)
            found[f"{prefix}answer_em"] = right
            found[f"{prefix}remove_ret_wrong_ans_right_em"] = split["only_ret"]
            if name == "kilt_nq":
                found[f"{prefix}remove_ret_wrong_ans_right"] = split["only_ret"]
                found[f"{prefix}ret_success.answer_em"] = split["success_score"]
                found[f"{prefix}ret_fail.answer_em"] = split["fail_score"]
        tasks = {
            "kilt_fever": ("ans_nli", code.compute_fever_nli),
            "kilt_wow": ("unigram_f1", code.compute_unigram_f1),
            "kilt_eli5": ("rougel", code.rougel_score),
        }
        if name in tasks:
            key, score = tasks[name]
            found[key], found[f"remove_ret_wrong_{key}"] = score(plain, precision)
        return found | code.revised_compute_autoais(items, None, at_most_citations=3)


def cleaned(scores: dict | str) -> dict | str:
    """Numbers that JSON can hold."""
    return scores if isinstance(scores, str) else {n: float(v) for n, v in scores.items()}


def main(arguments: list[str]) -> None:
    count = int(arguments.pop(0)) if arguments[0].isdigit() else 0
    peers, golden = Peers(*map(Path, arguments)), {}
    for name, (make, ours, recorded) in cases.SUITES.items():
        rng, worst, compared = random.Random(f"{name}{count}"), 0.0, 0
        golden[name] = []
        for _ in range(count or recorded):
            case = make(rng)
            with contextlib.redirect_stdout(io.StringIO()):
                theirs = cleaned(getattr(peers, name)(copy.deepcopy(case)))
            far = cases.difference(ours(case), theirs)
            if far > 1e-9 and compared - len(golden[name]) < 3:
                print(name, case, ours(case), theirs, sep="\n  ")
            worst, compared = max(worst, far), compared + 1
            golden[name].append([case, theirs])
        print(f"{name}: {compared} cases, largest difference {worst:.1e}")
    if not count:
        GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
