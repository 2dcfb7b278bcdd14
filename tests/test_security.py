"""What files of strangers may do: be read. Config files are programs, and the README says so."""

import ast
import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from cosup_jax.data import prepared, tokenizer
from cosup_jax.errors import UserError
from cosup_jax.hf.weights import _Files
from cosup_jax.main import main
from cosup_jax.runtime.paths import inside

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(
    path for folder in ("cosup_jax", "configs") for path in (ROOT / folder).rglob("*.py")
)
MAY = {  # file: what it alone may call, and why that is safe
    "cosup_jax/data/formats/plain_pickle.py": {"pickle._Unpickler"},  # nothing but plain values
    "cosup_jax/config_files.py": {"runpy.run_path"},  # config files are programs of the user's own
}
RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler", "marshal.loads"),
    *("shelve.open", "torch.load", "joblib.load", "dill.load", "dill.loads", "yaml.load"),
    *("os.system", "os.popen", "yaml.unsafe_load", "cloudpickle.load", "cloudpickle.loads"),
}
UNPACKS = {"extractall", "extract", "unpack_archive"}  # names in an archive may lead anywhere


def _name(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_or_unpacks_what_is_read(path):
    """Bugs: a plain unpickle, eval, torch.load or an unpacked archive of foreign data; code of a
    model's repository that is run; a shell that reads a file name."""
    allowed = MAY.get(str(path.relative_to(ROOT)), set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert _name(node) not in RUNS_CODE - allowed, f"line {node.lineno}: {_name(node)}"
        if not isinstance(node, ast.Call):
            continue
        assert _name(node.func) not in RUNS_CODE - allowed, f"line {node.lineno}"
        called = _name(node.func)
        assert called.rpartition(".")[2] not in UNPACKS, f"line {node.lineno}: {called}"
        given = {word.arg: word.value for word in node.keywords}
        for danger in ("trust_remote_code", "shell", "allow_pickle"):
            value = given.get(danger, ast.Constant(False))
            assert ast.unparse(value) == "False", f"line {node.lineno}: {danger}"
        if called.startswith(("Auto", "auto", "transformers.Auto")):
            told = "trust_remote_code" in given  # left out, a terminal would be asked
            assert told or not called.endswith("from_pretrained"), f"line {node.lineno}: {called}"


def test_code_in_a_tokenizer_directory_is_not_run(tmp_path):
    """Bug: a tokenizer's own Python, named by its auto_map, runs when the tokenizer is loaded."""
    small = tokenizer.train(["some text to train on"] * 4, 300)
    small.save(tmp_path / "t")
    mark = tmp_path / "ran"
    (tmp_path / "t" / "mine.py").write_text(f"open({str(mark)!r}, 'w')\nclass T: pass\n")
    path = tmp_path / "t" / "tokenizer_config.json"
    about = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]}}
    path.write_text(json.dumps(about | {"tokenizer_class": "T"}))
    try:
        tokenizer.load(tmp_path / "t")
    except UserError as error:
        assert "cannot be loaded" in str(error)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "", "a\0b"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    """Bug: a manifest, an index of weights or a bucket names a file of the machine's."""
    with pytest.raises(UserError, match="outside of itself"):
        inside(tmp_path, name)
    assert inside(tmp_path, "a/b..c") == tmp_path / "a/b..c"


def test_foreign_lists_of_files_are_checked(tmp_path):
    """Bug: the check exists, and those who read such lists do not call it."""
    save_file({}, tmp_path / "out.safetensors")
    weights = tmp_path / "w"
    weights.mkdir()
    index = {"weight_map": {"a": "../out.safetensors"}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside of itself"):
        _Files(weights, "").tensor("a")
    files = {"../out.safetensors": {"bytes": 1, "sha256": ""}}
    source = {"version": "1", "passages": 0, "splits": {}, "files": files}
    about = {"format": prepared.FORMAT, "settings": {}, "sources": {"x": source}}
    (weights / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="outside of itself"):
        prepared.load(str(weights), "x", tmp_path)


def test_secrets_of_the_environment_are_not_written(tmp_path, monkeypatch, capfd):
    """Bug: the environment, with its tokens, in a log, an error or a file of the workdir."""
    secrets = {}
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "COSUP_SECRET"):
        secrets[name] = f"hidden-{name.lower()}"
        monkeypatch.setenv(name, secrets[name])
    data = tmp_path / "x.jsonl"
    data.write_text('{"id": "1"}\n')
    (tmp_path / "x.passages.jsonl").write_text("")
    flags = [f"--config.data.train={data}", f"--config.data.eval={data}", "--mode=validate"]
    config = ROOT / "configs" / "base.py"
    assert main([f"--config={config}:smoke", f"--workdir={tmp_path / 'w'}", *flags]) == 2
    out, err = capfd.readouterr()
    written = [path.read_text() for path in (tmp_path / "w").rglob("*") if path.is_file()]
    everything = "".join([out, err, *written])
    assert written and not [name for name, text in secrets.items() if text in everything]
