"""Runs of seconds: forty towns, a tiny model, the command line."""

import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ARCH = {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 64}
CONFIG = """\
from cosup_jax.config import make

def get_config(variant=""):
    return make({overrides!r}, {{}}, variant)
"""


def environ(cache: Path, devices: int = 1) -> dict[str, str]:
    """That of a process of its own, whose programs are compiled quickly, and once for all that
    share `cache`."""
    return os.environ | {
        **{"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        **{"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "JAX_ENABLE_COMPILATION_CACHE": "true"},
        **{"JAX_COMPILATION_CACHE_DIR": str(cache)},
        **{"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    }


def write_data(directory: Path) -> Path:
    """Forty towns, four questions each, the last of them held out."""
    rng = random.Random(0)
    examples, passages = [], []
    for i in range(40):
        name = "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3)).title()
        facts = {what: str(rng.randint(100, 999)) for what in ("walls", "wells", "mills", "boats")}
        text = f"{name} has " + ", ".join(f"{n} {what}" for what, n in facts.items()) + "."
        passages.append({"id": f"p{i}", "title": name, "text": text})
        for what, n in facts.items():
            question = f"How many {what} has {name}?"
            split = "dev" if what == "boats" else "train"
            row = {"id": f"{i}{what}", "task": "open_qa", "question": question, "answers": [n]}
            examples.append(row | {"evidence": [f"p{i}"], "split": split})
    for name, rows in (("towns", examples), ("towns.passages", passages)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory / "towns.jsonl"


def write_config(directory: Path, **overrides: Any) -> Path:
    """A config file in `directory`, beside its data; `a__b=value` for a.b."""
    data = str(write_data(directory))
    keys = {
        **{f"gen.arch.{key}": value for key, value in ARCH.items()},
        **{"data.train": data, "data.eval": data, "data.vocab_size": 400},
        **{"batch_size": 8, "data.max_gen_tokens": 128, "data.ctx_rows": 8},
        **{"data.ctx_row_tokens": 128, "log.every_steps": 1, "eval.examples": 20},
        **{"generate.examples": 2, "generate.max_tokens": 64},
        **{"bank.kind": "dual", "bank.size": 128, "bank.queries": 128},
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }
    path = directory / "towns.py"
    path.write_text(CONFIG.format(overrides=keys))
    return path


def metrics(workdir: Path) -> list[Mapping[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
