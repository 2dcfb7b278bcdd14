"""A few held-out questions answered and scored while training goes on, and shown at its end."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from cosup_jax.answer import asked
from cosup_jax.answer.answering import Answering, Record
from cosup_jax.answer.asked import Arm
from cosup_jax.config import ARMS, Config
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.evaluation import scoring
from cosup_jax.evaluation.nli import judge_named
from cosup_jax.held_out import HeldOut
from cosup_jax.search.encoder import Encoder
from cosup_jax.towers import Towers

_LOGGED = ("correct", "f1", "retrieval_hit", "Rprec")
_GROUNDING = ("citation_rec", "citation_prec")  # behind the judge's prefix


class Sample:
    """The same questions of every set each time, drawn by eval.seed; compiled once."""

    def __init__(
        self,
        sets: Sequence[HeldOut],
        mesh: Mesh,
        towers: Towers,
        config: Config,
        tokenizer: Tokenizer,
    ):
        """`tokenizer` is Gen's."""
        self.shown = -(-config.generate.examples // max(1, len(sets)))  # of each set
        self._each = max(config.eval.answers, self.shown)
        self._sets, self._config = sets if self._each else (), config
        most = min(config.generate.batch_size, self._each)
        self._answering = Answering(mesh, towers, config, tokenizer, most)
        self._encoder = Encoder(mesh, towers, config)
        self._judge = judge_named(config.eval.judge)
        self._prefix = getattr(self._judge, "prefix", "")
        self._step, self._records = -1, {}

    def at(self, step: int, params: dict) -> dict[str, list[Record]]:
        """{set: answers, scored}; those of the newest step are remembered."""
        if self._step != step:
            corpora, self._records = {}, {}
            for part in self._sets:
                source = part.dataset.version  # sets of one source share its corpus
                if source not in corpora:
                    corpora[source] = self._encoder.corpus(params, part.corpus, len(part.corpus))
                self._records[part.name] = self._answers(part, params, corpora[source])
            self._step = step
        return self._records

    def metrics(self, step: int, params: dict) -> dict[str, float]:
        """`eval/<set>/answers_<score>` of a few scores: means over the answers that have them."""
        found = {}
        for name, records in self.at(step, params).items():
            asked_for = records[: self._config.eval.answers]  # any others are there to be shown
            rows = [record["scores"] for record in asked_for]
            rows += [{"correct": r["correct"]} for r in asked_for if r["correct"] is not None]
            for score in (*_LOGGED, *(f"{self._prefix}{name}" for name in _GROUNDING)):
                if values := [row[score] for row in rows if score in row]:
                    found[f"eval/{name}/answers_{score}"] = float(np.mean(values))
        return found

    def _answers(self, part: HeldOut, params: dict, vector_NxD: np.ndarray) -> list[Record]:
        order = np.random.default_rng(self._config.eval.seed).permutation(len(part.examples))
        questions = order[: self._each].tolist()
        facts = [asked.about(part, question) for question in questions]
        arm = Arm("corpus", ARMS["corpus"], len(part.corpus))
        written = self._answering.answers(params, part, questions, arm, vector_NxD)
        records = [record | fact for record, fact in zip(written, facts, strict=True)]
        correct = scoring.judged_by(part.split_sample())
        scores = scoring.scored(records, self._judge, part.dataset.passages)
        return [
            record | {"scores": found, "correct": found.get(correct)}
            for record, found in zip(records, scores, strict=True)
        ]
