"""--mode=encode and --mode=mine as a user runs them: end to end, by two processes, at a size."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import towns

from cosup_jax.config import DataConfig
from cosup_jax.data import sources
from cosup_jax.search.vectors import Vectors

ROOT = Path(__file__).parent.parent
PROGRAM = r"""
import re, resource, sys
from pathlib import Path
import numpy as np
from cosup_jax.search import index, vectors
from cosup_jax.contract import EmbeddingContract
from cosup_jax.search.vectors import Layout, Vectors

rows, width, directory = int(sys.argv[1]), 256, Path(sys.argv[2])
given = dict.fromkeys(EmbeddingContract.__dataclass_fields__, 1) | {"width": width}
layout = Layout(EmbeddingContract(**given), "", rows, "float32", 16_384, "float32")
rng = np.random.default_rng(0)
for name, part in layout.shards():
    shard = rng.random((len(part), width), np.float32)
    vectors.write_shard(directory / name, shard, [f"passage {row}" for row in part], "float32")
vectors.write_manifest(directory, layout)
found = Vectors.open(directory)
index.search(rng.random((300, width), np.float32), found, 10)
print(found.ids[rows - 1])
status = Path("/proc/self/status").read_text()
print("MiB", int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_index(tmp_path):
    """Bug: shards, ids or copies of chunks that are held until the end."""
    used = []
    for rows in (131_072, 524_288):
        run = [sys.executable, "-c", PROGRAM, str(rows), str(tmp_path / str(rows))]
        output = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT).stdout
        used.append(float(re.search(r"MiB ([\d.]+)", output)[1]))
    print(f"private MiB with 128 and 512 MiB of vectors: {used}")
    assert used[1] < used[0] + 40


@pytest.mark.slow
def test_train_encode_mine_train(tmp_path):
    """Bugs: a mode that only its parts' tests know to work; two processes that write other vectors
    than one, or wait for each other; a mined source that does not train."""
    source = towns.write_data(tmp_path)
    keys = {f"{tower}.arch.{name}": size for tower in ("gen",) for name, size in towns.ARCH.items()}
    keys |= {"data.train": str(source), "data.eval": str(source), "data.vocab_size": 400}
    keys |= {"num_steps": 4, "batch_size": 8, "data.ctx_rows": 8, "index.shard_rows": 7}
    (tmp_path / "tiny.py").write_text(
        towns.CONFIG.format(overrides=keys | {"index.mine_margin": 0.0})
    )

    def run(*argv, workdir="one", processes=1):
        script = [sys.executable, "-m", "cosup_jax.main"]
        if processes > 1:
            script = [
                "bash",
                str(ROOT / "launch" / "local_processes.sh"),
                str(processes),
                "1",
                "--",
            ]
        done = subprocess.run(
            [*script, f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / workdir}", *argv],
            env=towns.environ(tmp_path / "cache"),
            **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 280},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run()
    one, two = tmp_path / "one" / "index" / "towns", tmp_path / "two" / "index" / "towns"
    said = run("--mode=encode", "--config.index.faiss=true")
    assert "towns: 40 distinct of 40 passages, 32 x float32" in said
    assert (one / "index.faiss").stat().st_size == 45 + 4 * 40 * 32
    (tmp_path / "two").mkdir()
    for name in ("checkpoints", "tokenizer"):
        (tmp_path / "two" / name).symlink_to(tmp_path / "one" / name)
    run("--mode=encode", workdir="two", processes=2)
    ours, theirs = Vectors.open(two), Vectors.open(one)
    assert list(ours.ids) == list(theirs.ids) and ours.key == theirs.key
    np.testing.assert_allclose(ours.take(range(40)), theirs.take(range(40)), atol=1e-6)
    said = run("--mode=mine")
    kept = int(
        re.search(r"towns: (\d+) hard negatives for 120 questions with 120 \[Ret\]", said)[1]
    )
    mined = tmp_path / "one" / "mined" / "towns.jsonl"
    dataset, problems = sources.load(str(mined), DataConfig(), tmp_path / "data")
    assert sum(len(example.hard_negatives) for example in dataset.examples) == kept > 0
    assert not problems.errors and {k: len(v) for k, v in dataset.splits.items()} == {
        "train": 120,
        "dev": 40,
    }
    named = f"--config.data.train={mined}", f"--config.data.eval={mined}"
    assert "done: " in run(*named, workdir="three")
