"""Prepared data: the tokens that a run would have made itself, refused where they are not."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from files import full_disk
from test_validate import rows, write

from cosup_jax import assemble, prepare
from cosup_jax.data import prepared, sources, tokens
from cosup_jax.dotted import replace_dotted
from cosup_jax.errors import UserError


def read(config, workdir):
    """(sources, training store, tokenizers) as a run reads them."""
    data = assemble.read_sources(config, workdir / "data")
    tokenizers = assemble.read_tokenizers(config, workdir, data)
    return data, tokens.tokenize(data.train, *tokenizers, config, workdir / "data"), tokenizers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The config over the JSONL, over what was prepared from it, and where that is."""
    path = tmp_path_factory.mktemp("prepared")
    passages, examples = rows()
    examples[0] |= {"hard_negatives": ["Quito"], "candidates": ["Lima"], "kind": "span"}
    examples[1] |= {"evidence": ["Lima", "Quito"], "support": [[0, 4], None]}
    examples[2]["evidence"] = []
    plain = write(path, passages, examples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "FILE_ROWS", 5)  # several files
        prepare.prepare(plain, str(path / "work"))
        where = path / "work" / "prepared"
        config = replace_dotted(plain, "data.train", f"prepared:{where}")
        yield plain, replace_dotted(config, "data.eval", f"prepared:{where}::x"), where


def test_the_tokens_are_those_of_the_source(made, tmp_path):
    """Bug: a run on prepared data trains on something else than a run on the source."""
    plain, config, _ = made
    ours, store, tokenizers = read(plain, tmp_path / "a")
    theirs, again, same = read(config, tmp_path / "b")
    assert tokenizers.gen.fingerprint == same.gen.fingerprint
    for name in (*tokens._CTX, *tokens._GEN, *tokens._PER_SOURCE):
        if name != "gen_rows":  # prepared examples lie split by split
            np.testing.assert_array_equal(getattr(store, name), getattr(again, name), err_msg=name)
    (a, _), (b, _) = ours.train[0], theirs.train[0]
    assert dict(a.passages) == dict(b.passages) and a.passages.row("Quito") == 1
    for split in ("train", "test"):
        assert list(a.rows(split)) == list(b.rows(split))
    held_out = [
        tokens.tokenize([(d, 1.0)], *tokenizers, plain, tmp_path / "c", "test") for d in (a, b)
    ]
    np.testing.assert_array_equal(held_out[0].gen_tokens, held_out[1].gen_tokens)


def test_nothing_is_tokenised_again(made, tmp_path, monkeypatch):
    """Bug: a pod that reads text and tokenises it although the tokens are there."""
    for name in ("encode", "ctx_tokens", "pieces"):
        monkeypatch.setattr(tokens.markup, name, lambda *_: pytest.fail("tokenised"))
    assert read(made[1], tmp_path)[1].num_examples == 12


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("data.max_ctx_tokens", 50, r"data\.max_ctx_tokens 60, this run has 50"),
        ("ctx.pooling", "last", r"ctx\.pooling 'eos', this run has 'last'"),
        ("data.no_evidence_fraction", 0.5, r"no_evidence_fraction 0\.0, this run has 0\.5"),
    ],
)
def test_other_settings_are_refused(made, tmp_path, key, value, reason):
    """Bug: tokens of other settings used in silence."""
    with pytest.raises(UserError, match=reason):
        read(replace_dotted(made[1], key, value), tmp_path)


def test_what_is_missing_or_damaged_is_named(made, tmp_path):
    """Bug: a traceback, or fewer rows than were prepared."""
    where = made[2]
    with pytest.raises(UserError, match="there is x"):
        sources.load(f"prepared:{where}::y", made[1].data, tmp_path)
    with pytest.raises(UserError, match="no prepared data here"):
        sources.expand(f"prepared:{tmp_path}")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in where.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    damaged = copy / "x.examples-00001.array_record"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"x\.examples-00001\.array_record: missing or cut off"):
        sources.load(f"prepared:{copy}::x", made[1].data, tmp_path)
    about = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(about | {"format": 0}))
    with pytest.raises(UserError, match="another version"):
        sources.expand(f"prepared:{copy}")


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the prepared data, to be damaged."""
    shutil.copytree(made[2], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("trained", [True, False])
def test_rows_without_their_evidence_are_not_evaluated(made, copied, tmp_path, trained):
    """Bug: training rows whose evidence was taken away are scored as if held out."""
    about = json.loads((copied / "manifest.json").read_text())
    about["settings"]["data.no_evidence_fraction"] = 0.5
    about["sources"]["x"]["splits"] = {"train": sum(about["sources"]["x"]["splits"].values())}
    (copied / "manifest.json").write_text(json.dumps(about))
    config = replace_dotted(made[0], "data.eval", f"prepared:{copied}")
    config = replace_dotted(config, "data.train", config.data.eval) if trained else config
    with pytest.raises(UserError, match="holds nothing out, and its training rows were prepared"):
        assemble.read_sources(config, tmp_path)


def test_zeroed_bytes_are_found(made, copied, tmp_path):
    """Bug: the SHA-256 of the manifest is compared with nothing, and zeros are trained on."""
    for name in ("x.examples-00001.array_record", "x.passages-00000.array_record", "x_by_hash"):
        whole = (copied / name).read_bytes()
        (copied / name).write_bytes(bytes(len(whole)))
        with pytest.raises(UserError, match=rf"{name}: not what was written; run --mode=prepare"):
            sources.load(f"prepared:{copied}::x", made[1].data, tmp_path)
        (copied / name).write_bytes(whole)
    sources.load(f"prepared:{copied}::x", made[1].data, tmp_path)


@pytest.mark.parametrize(("first", "last"), [(0, 2**16), (100, 200)], ids=["file", "record"])
def test_a_record_that_cannot_be_read_is_one_line(made, copied, tmp_path, first, last):
    """Bug: a reader's traceback for a file that went bad after its digest was remembered."""
    name = "x.examples-00000.array_record"
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[:first] + bytes(last - first) + whole[last:])
    about = json.loads((copied / "manifest.json").read_text())
    about["sources"]["x"]["files"][name] = prepared._fact(copied / name)
    (copied / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"examples.*: damaged \(.*; run --mode=prepare again"):
        list(sources.load(f"prepared:{copied}::x", made[1].data, tmp_path)[0].examples)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "another version"),
        (("sources",), None, "damaged"),
        (("sources", "x"), 3, "damaged"),
        (("sources", "x", "splits", "train"), "12", "damaged"),
        (("sources", "x", "splits", "train"), 13, "16 rows where the manifest has 17"),
        (("sources", "x", "passages"), 7, "8 rows where the manifest has 7"),
        (("sources", "x", "files", "x_hashes"), {"bytes": 1}, "damaged"),
        (("settings",), [], "damaged"),
        (("settings", "data.new"), 1, "another version of this program, which knows other set"),
        (("settings", "template"), ..., "another version of this program, which knows other set"),
    ],
)
def test_a_damaged_manifest_is_one_line(made, copied, tmp_path, path, value, message):
    """Bug: a traceback for a manifest that somebody has edited, or that another version wrote."""
    about = inner = {"": json.loads((copied / "manifest.json").read_text())}
    *outer, key = ("", *path)
    for name in outer:
        inner = inner[name]
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    (copied / "manifest.json").write_text(json.dumps(about[""]))
    config = replace_dotted(made[1], "data.train", f"prepared:{copied}::x")
    with pytest.raises(UserError, match=message) as error:
        read(replace_dotted(config, "data.eval", f"prepared:{copied}::x"), tmp_path)
    assert "\n" not in str(error.value)


def test_what_has_no_ret_is_left_to_the_run(made, tmp_path):
    """Bug: data.drop_without_ret of the preparation leaves fewer rows than the manifest counts."""
    plain = replace_dotted(made[0], "data.drop_without_ret", True)
    prepare.prepare(plain, str(tmp_path))
    about = prepared.manifest(str(tmp_path / "prepared"))
    assert about["sources"]["x"]["splits"] == {"train": 12, "test": 4}


def test_what_is_only_evaluated_may_be_prepared_beside(made, tmp_path):
    """Bugs: prepared:DIR, which stands for all that is in it, is refused for the part that is only
    evaluated; a source that is not prepared is let through with it."""
    dataset = assemble.read_sources(made[1], tmp_path / "data").train[0][0]
    evaluated = dataclasses.replace(dataset, splits={"test": dataset.splits["test"]})
    assemble.refuse_untrained(assemble.Sources([(dataset, 1.0), (evaluated, 1.0)], [], {}))
    plain = dataclasses.replace(evaluated, examples=list(evaluated.examples))
    with pytest.raises(UserError, match="no example has split 'train', only test"):
        assemble.refuse_untrained(assemble.Sources([(plain, 1.0)], [], {}))


def test_a_killed_preparation_is_not_read(made, tmp_path, monkeypatch):
    """Bug: old tokens beside new ones after a second preparation was stopped half way."""
    plain = made[0]
    prepare.prepare(plain, str(tmp_path))

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared, "write", die)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(plain, str(tmp_path))
    with pytest.raises(UserError, match="no prepared data here"):
        sources.expand(f"prepared:{tmp_path}/prepared")
    monkeypatch.undo()
    prepare.prepare(plain, str(tmp_path))
    assert sources.expand(f"prepared:{tmp_path}/prepared") == [f"prepared:{tmp_path}/prepared::x"]


def test_a_full_disk_is_one_line(tmp_path):
    """Bug: a traceback of the writer's, and a temporary file that stays."""
    rows = iter([{"tokens": bytes(1 << 20)}])
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*: File too large"):
        prepared._write_records(tmp_path, "x", rows, 1)
    assert not list(tmp_path.iterdir())


def test_the_manifest_tells_what_there_is(made):
    """Bug: prepared data that nobody can trace."""
    about = prepared.manifest(str(made[2]))
    source = about["sources"]["x"]
    assert source["splits"] == {"train": 12, "test": 4} and source["passages"] == 8
    assert len([name for name in source["files"] if "examples-" in name]) == 4
    for name, fact in source["files"].items():
        assert (Path(made[2]) / name).stat().st_size == fact["bytes"] and len(fact["sha256"]) == 64
