"""A run whose losses are no longer numbers, as its user meets it."""

import json

import pytest
from test_train import tiny  # noqa: F401, a fixture

from cosup_jax import main as main_lib


@pytest.mark.slow
def test_a_run_of_bad_steps_ends(tiny, tmp_path, capsys):  # noqa: F811
    """Bug: a diverged run that goes on for days, that saves its NaN, or ends in a traceback."""
    workdir = tmp_path / "run"
    flags = {
        **{"batch_size": 8, "data.ctx_rows": 8, "bank.kind": "off", "eval.every_steps": 100},
        **{"optim.gen_learning_rate": 1e30, "optim.max_bad_steps": 2, "eval.examples": 4},
    }
    overrides = [f"--config.{key}={value}" for key, value in flags.items()]
    assert main_lib.main([f"--config={tiny}", f"--workdir={workdir}", *overrides]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: loss or gradient was not finite in ")
    assert "checkpoints are at steps [" in error and "learning_rate" in error
    assert json.loads((workdir / "status.json").read_text())["state"] == "failed"
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["skipped/total"] == 0 and rows[-1]["skipped/in_a_row"] >= 2
    assert rows[-1]["step"] < 12
