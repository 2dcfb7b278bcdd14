"""What a study compares and measures, from its config, checked before the first run."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cosup_jax.config import Config, StudyConfig, to_dict
from cosup_jax.config_files import File, load
from cosup_jax.data.sources import check_corpus
from cosup_jax.dotted import differing, get_dotted, replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.evaluate import digest
from cosup_jax.studies import measures, results
from cosup_jax.studies.arms import MINED, START
from cosup_jax.studies.equal_ratio import AT_START, Matched
from cosup_jax.studies.measures import MEASURES
from cosup_jax.studies.results import Claim

DIGITS = 12  # of a digest, in a name
# Keys that may name what another run has made.
_FROM_RUNS = {"gen.init": START, "ctx.init": START, "data.train": MINED, "data.eval": MINED}
_MADE = {START: "export/gen", MINED: "mined/*.jsonl"}  # in the directory of that other run
# Groups of the config that a trained model does not depend on.
_ASIDE = ("checkpoint", "eval", "export", "generate", "index", "log", "study")


class Arm(NamedTuple):
    """One run: an arm under one seed."""

    name: str
    seed: int
    config: Config
    directory: Path

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


class Design(NamedTuple):
    """What the config asks for."""

    config: Config
    file: File
    root: Path
    directory: Path
    arms: list[str]
    crossed: list[tuple[str, str]]
    measures: list[str]
    shown: list[str]
    claims: list[Claim]
    kinds: dict[str, str]  # of each metric shown or claimed, as `run.Gives` has them
    matched: dict[str, Matched]  # each "ARM@OTHER" that a claim names

    @classmethod
    def of(cls, config: Config, root: Path, file: File) -> "Design":
        """Raises UserError."""
        told = config.study
        arms = _names(told.arms)
        if not arms:
            raise UserError(
                f"config.study.arms of {file.path_and_variant} is empty; name some, as in N,C, or "
                "take a study of configs/studies"
            )
        _check_arms(file, arms)
        matched = _matched(told.claims, arms, file)
        told = _without_absent(told, file, [*arms, *matched])
        _check_matched(told.claims, arms, matched)
        crossed = [tuple(pair.split("|")) for pair in _names(told.crossed)]
        for pair in crossed:
            if len(pair) != 2 or not set(pair) <= set(arms):
                raise UserError(f"config.study.crossed: {'|'.join(pair)!r} is no ARM|ARM of {arms}")
        asked = _names(told.measures)
        for name in asked:
            if name not in MEASURES:
                raise UserError(f"config.study.measures: {name!r} is none of {', '.join(MEASURES)}")
        claims = results.claims_of(told.claims, [*arms, *map("|".join, crossed), *matched])
        shown = _names(told.shown) or list(dict.fromkeys(claim.metric for claim in claims))
        claims, shown = _without_unmeasured(claims, shown, config, file, asked)
        kinds = _kinds(claims, shown, config, asked)
        named = {name for claim in claims for name in (claim.better, claim.other)}
        matched = {name: curve for name, curve in matched.items() if name in named}
        _check_ratio(matched, config, asked)
        check_corpus(config.eval.corpus)
        directory = root / _directory_name(config.study.name or file.name, root)
        design = cls(
            config, file, root, directory, arms, crossed, asked, shown, claims, kinds, matched
        )
        design._check_unlike()
        return design

    @property
    def writers(self) -> list[str]:
        """The arms whose Gen was trained to write."""
        return [name for name in self.arms if self.file.variant(name).loss.ntp_weight]

    def _check_unlike(self) -> None:
        """Raises UserError for two arms that are one run: it would be compared with itself."""
        first: dict[str, str] = {}
        for name in self.arms:
            key = self.arm(name, self.config.seed).directory.name
            if (other := first.setdefault(key, name)) != name:
                raise UserError(
                    f"config.study.arms: {name} has the settings of {other}, and would be the same "
                    f"run; change it in {self.file.path_and_variant.partition(':')[0]}, or drop it"
                )

    def arm(self, name: str, seed: int) -> Arm:
        """One run. Raises UserError for a variant that the file does not have."""
        config = self.file.variant(name)
        config = replace_dotted(replace_dotted(config, "seed", seed), "study", StudyConfig())
        key = config
        for setting, mark, variant in _from_runs(config):
            start = self.arm(variant, self.config.seed)  # one for all seeds
            config = replace_dotted(config, setting, str(start.directory / _MADE[mark]))
            mining = [pair for pair in set_keys(config) if pair[0].startswith("index.mine")]
            made_by = digest(mining)[:DIGITS] if mark == MINED and mining else ""
            key = replace_dotted(key, setting, mark + start.directory.name + made_by)
        return Arm(name, seed, config, self.root / "arms" / _key(key))

    def starts(self, arm: Arm) -> Iterator[tuple[Arm, str]]:
        """The runs that an arm's towers or data come from, and START or MINED."""
        told = _from_runs(self.file.variant(arm.name))
        for variant, mark in dict.fromkeys((variant, mark) for _, mark, variant in told):
            yield self.arm(variant, self.config.seed), mark


def of_pair(config: Config) -> Config:
    """By which one arm's Gen is asked where another arm's pair retrieves."""
    whole = dataclasses.replace(config.eval, arms="corpus", corpus_sizes="", hard_corpus_sizes="")
    return dataclasses.replace(config, eval=whole)


def set_keys(config: Config) -> list[tuple[str, Any]]:
    """The keys that are not as by default: those that later versions add change no digest."""
    changed = differing(to_dict(Config()), to_dict(config))
    return [(key, value) for key, (_, value) in changed.items()]


def _directory_name(name: str, root: Path) -> str:
    """Raises UserError for one that leads elsewhere, or to the runs."""
    if name in ("arms", "..") or Path(name).name != name:
        raise UserError(
            f"config.study.name={name!r}: pages lie in a directory of {root} of this name, beside "
            "the runs in `arms`; take a name without slashes, such as core-again"
        )
    return name


def _from_runs(config: Config) -> Iterator[tuple[str, str, str]]:
    """Those that do, START or MINED, and the variant of the other run."""
    for setting, mark in _FROM_RUNS.items():
        if (told := get_dotted(config, setting)).startswith(mark):
            yield setting, mark, told.removeprefix(mark)


def _check_arms(file: File, arms: Sequence[str]) -> None:
    """Raises UserError for an arm that is none, and for an override of what an arm consists in."""
    for name in arms:
        try:
            config = file.variant(name)
        except UserError as error:
            trained = [f"--config.{key}" for key in file.overrides if not key.startswith("study.")]
            with_them = f", with {', '.join(trained)}" if trained else ""
            raise UserError(f"arm {name}{with_them}: {error}") from error
        own = file.settings(name) if file.overrides else {}
        for key in file.overrides & own.keys():
            raise UserError(
                f"--config.{key} would undo what arm {name} consists in, {key}={own[key]!r}; "
                f"drop it, or change the arm in {file.path_and_variant.partition(':')[0]}"
            )
        _check_arms(file, [variant for *_, variant in _from_runs(config)])


def _without_absent(told: StudyConfig, file: File, there: Sequence[str]) -> StudyConfig:
    """Where the command line chooses among the file's arms or pairs, its pairs and claims of the
    others are left out, and it is said which.

    Args:
      there: the arms, and what is made of them by `_matched`.
    """
    if not {"study.arms", "study.crossed"} & set(file.overrides):
        return told
    own = load(file.path_and_variant).study
    absent = {*_names(own.arms), *_at_ratios(own.claims)} - set(there)
    for key, mark in (("crossed", ","), ("claims", ";")):
        parts = [part.strip() for part in getattr(told, key).split(mark) if part.strip()]
        named = lambda part: set(part.partition(":")[0].split())
        left_out = [
            part
            for part in parts
            if any(name in absent or absent & set(name.split("|")) for name in named(part))
        ]
        if f"study.{key}" not in file.overrides and left_out:
            print(f"left out for want of arms: {'; '.join(left_out)}")
            kept = mark.join(part for part in parts if part not in left_out)
            told = dataclasses.replace(told, **{key: kept})
        if key == "crossed":
            absent |= set(_names(own.crossed)) - set(_names(told.crossed))
    return told


def _without_unmeasured(
    claims: list[Claim], shown: list[str], config: Config, file: File, asked: Sequence[str]
) -> tuple[list[Claim], list[str]]:
    """Likewise, where it chooses among the file's measures."""
    if "study.measures" not in file.overrides:
        return claims, shown
    own = _names(load(file.path_and_variant).study.measures)
    given = lambda metric, names: measures.kind_of(metric, config, names) is not None
    absent = lambda key, metric: (
        f"study.{key}" not in file.overrides and given(metric, own) and not given(metric, asked)
    )
    of_claims = [claim.metric for claim in claims if absent("claims", claim.metric)]
    of_shown = [metric for metric in shown if absent("shown", metric)]
    if left_out := dict.fromkeys([*of_claims, *of_shown]):
        print(f"left out for want of measures: {', '.join(left_out)}")
    claims = [claim for claim in claims if claim.metric not in of_claims]
    return claims, [metric for metric in shown if metric not in of_shown]


def _matched(claims: str, arms: Sequence[str], file: File) -> dict[str, Matched]:
    """Each ARM@OTHER of two arms that is named, if ARM has several nsp_weights."""
    settings, found = {name: file.variant(name) for name in arms}, {}
    alike = lambda name: replace_dotted(settings[name], "loss.nsp_weight", 1.0)
    for name in _at_ratios(claims):
        arm, _, other = name.partition("@")
        if {arm, other} <= set(arms) and arm != other:
            same = [one for one in arms if alike(one) == alike(arm)]
            curve = [one for one in same if settings[one].loss.trains_nsp]
            if len(curve) > 1:
                found[name] = Matched(curve, other)
    return found


def _at_ratios(claims: str) -> list[str]:
    """Each ARM@OTHER that is claimed about."""
    heads = (part.partition(":")[0].split() for part in claims.split(";"))
    return [name for head in heads for name in head if "@" in name]


def _check_matched(claims: str, arms: Sequence[str], matched: Mapping[str, Matched]) -> None:
    """Raises UserError for an ARM@OTHER that is none."""
    for name in _at_ratios(claims):
        arm, _, other = name.partition("@")
        if absent := [one for one in (arm, other) if one not in arms]:
            raise UserError(
                f"config.study.claims: {name!r}: {absent[0]!r} is no arm of {', '.join(arms)}; add "
                "it to config.study.arms, or drop the claim"
            )
        if name not in matched:
            raise UserError(
                f"config.study.claims: {name!r} is read off a curve of {arm} and arms that differ "
                "from it in loss.nsp_weight alone; there is none in config.study.arms, or "
                f"{other} is {arm} itself"
            )


def _check_ratio(matched: Mapping[str, Matched], config: Config, asked: Sequence[str]) -> None:
    """Raises UserError where nothing says at which ratio an arm is to be read."""
    if matched and measures.kind_of(AT_START, config, asked) is None:
        mend = "add training to config.study.measures"
        if "training" in asked:
            mend = "set config.log.probe_every_steps, in a workdir without runs trained at 0"
        names = ", ".join(matched)
        raise UserError(f"config.study.claims of {names}: {AT_START} is not measured; {mend}")


def _kinds(
    claims: Sequence[Claim], shown: Sequence[str], config: Config, asked: Sequence[str]
) -> dict[str, str]:
    """Raises UserError for a metric that no measure gives, of arms or of a pair of them."""
    of_pairs = [claim.metric for claim in claims if "|" in claim.better + claim.other]
    measures.kinds("config.study.claims of pairs", of_pairs, of_pair(config), ["answers"])
    claimed = [claim.metric for claim in claims]
    kinds = measures.kinds("config.study.claims", claimed, config, asked)
    return kinds | measures.kinds("config.study.shown", shown, config, asked)


def _key(config: Config) -> str:
    """Of all that training depends on."""
    told = [pair for pair in set_keys(config) if pair[0].split(".")[0] not in _ASIDE]
    return digest(told)[:DIGITS]


def _names(text: str) -> list[str]:
    """Each once: an arm that is named twice has no more seeds."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
