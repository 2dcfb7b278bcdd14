"""Weights of 1.1 B parameters reach their devices without a second copy on the host."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

LAYERS, D, F, HEADS, KV_HEADS, V, FILES = 22, 2048, 5632, 32, 4, 32000, 4  # TinyLlama's shape
LOAD = """
import re, sys, threading, time
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
from cosup_jax import sharding
from cosup_jax.config import ArchConfig, MeshConfig
from cosup_jax.hf import weights
from cosup_jax.transformer import Transformer

def private():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

fields = weights.arch_from_hf(sys.argv[1])
model = Transformer(vocab_size=fields.pop("vocab_size"), arch=ArchConfig(**fields))
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
shapes = jax.eval_shape(model.init, jax.random.key(0))
places = sharding.tree_shardings(mesh, model.logical_axes(), shapes)
describe = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
abstract = jax.tree.map(describe, shapes, places)
before, peak, done = private(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, private())

watcher = threading.Thread(target=watch)
watcher.start()
params = jax.tree.leaves(weights.load_gen(sys.argv[1], abstract))
done.set()
watcher.join()
shard = max(shard.data.nbytes for leaf in params for shard in leaf.addressable_shards)
print(sum(leaf.nbytes for leaf in params), peak - before, shard)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    home = tmp_path_factory.mktemp("1b")
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}
    shapes["model.norm.weight"] = (D,)
    E = D // HEADS
    for layer in range(LAYERS):
        for name, shape in (
            *(("input_layernorm", (D,)), ("post_attention_layernorm", (D,))),
            *(("self_attn.q_proj", (HEADS * E, D)), ("self_attn.o_proj", (D, HEADS * E))),
            *(("self_attn.k_proj", (KV_HEADS * E, D)), ("self_attn.v_proj", (KV_HEADS * E, D))),
            *(("mlp.gate_proj", (F, D)), ("mlp.up_proj", (F, D)), ("mlp.down_proj", (D, F))),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    where, items = {}, list(shapes.items())
    for number in range(FILES):
        file, part = f"model-{number}.safetensors", dict(items[number::FILES])
        zeros = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in part.items()}
        save_file(zeros, home / file)
        where |= dict.fromkeys(part, file)
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {"model_type": "llama", "hidden_size": D, "intermediate_size": F, "vocab_size": V}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    (home / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    return home


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_loading_costs_one_shard_beside_the_arrays(directory, devices):
    """Bug: a whole file, a whole stacked leaf or all shards of one lie on the host as well."""
    command = [sys.executable, "-c", LOAD, str(directory), str(devices)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    loaded, peak, shard = map(int, found)
    GiB = 2**30
    print(
        f"{devices} device(s): {loaded / GiB:.2f} GiB loaded, at most {(peak - loaded) / GiB:.2f} "
        f"beside them; the largest shard has {shard / GiB:.2f} GiB"
    )
    assert loaded > 4 * GiB
    assert peak - loaded < max(shard, 4 * V * D) + 2**29
