"""Memory and a corpus of many passages."""

import json
import re
import subprocess
import sys

import pytest

PROGRAM = r"""
import re, sys
from pathlib import Path
import jax
from cosup_jax import sharding
from cosup_jax.config import make
from cosup_jax.data import pipeline, sources, tokenizer, tokens
from cosup_jax.data.plan import Plan
from cosup_jax.freeze import freeze

path = Path(sys.argv[1])
config = freeze(make({"num_steps": 50, "batch_size": 16}, {}))
dataset, _ = sources.load(str(path / "x.jsonl"), config.data, path / "data")
bpe = tokenizer.train(["title text answer 0123456789"], 300)
store = tokens.tokenize([(dataset, 1.0)], bpe, bpe, config, path / "data")
rows = sharding.rows(sharding.make_mesh(config.mesh))
for batch in pipeline.batches(store, Plan(store, config), config, rows, rows, 0, 50):
    jax.block_until_ready(batch)
status = Path("/proc/self/status").read_text()
print("MiB", int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Bug: passages held as Python objects, a kilobyte each: a million of them take a gigabyte."""
    used = []
    for count in (1_000, 1_000_000):
        path = tmp_path / str(count)
        path.mkdir()
        with (path / "x.passages.jsonl").open("w") as file:
            for i in range(count):
                row = {"id": f"p{i}", "title": f"title {i}", "text": f"text {i}"}
                file.write(json.dumps(row) + "\n")
        with (path / "x.jsonl").open("w") as file:
            for i in range(1_000):
                row = {"id": f"e{i}", "task": "open_qa", "question": f"{i}?", "answers": ["x"]}
                file.write(json.dumps(row | {"evidence": [f"p{i * count // 1_000}"]}) + "\n")
        run = [sys.executable, "-c", PROGRAM, str(path)]
        for _ in range(2):  # the second time everything is kept on disk, as on a resume
            output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
        used.append(float(re.search(r"MiB ([\d.]+)", output)[1]))
    print(f"private MiB with 1,000 and 1,000,000 passages: {used}")
    assert used[1] < used[0] + 20
