"""A workdir with a checkpoint that nothing has trained, beside its data and config."""

import json
from pathlib import Path

import jax

from cosup_jax import assemble, config_files, optim
from cosup_jax import step as step_lib
from cosup_jax.checkpoint import Checkpointer
from cosup_jax.config import to_dict
from cosup_jax.contract import weights_digest

TINY = {
    **{"gen.arch.layers": 1, "gen.arch.width": 32, "gen.arch.heads": 2, "gen.arch.kv_heads": 1},
    **{"gen.arch.head_dim": 16, "gen.arch.mlp_width": 32, "num_steps": 1, "batch_size": 8},
    **{"data.vocab_size": 300, "data.max_gen_tokens": 64, "data.ctx_rows": 8},
    **{"data.max_ctx_tokens": 24, "data.ctx_row_tokens": 48},
}


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(home: Path, **keys) -> None:
    """home/config.py: a tiny model, and these keys with __ for a dot."""
    found = TINY | {name.replace("__", "."): value for name, value in keys.items()}
    (home / "config.py").write_text(
        "from cosup_jax.config import make\n"
        f"def get_config(variant=''):\n    return make({found!r}, {{}}, variant)\n"
    )


def config_of(home: Path, **flags):
    """That config, with flags as on the command line."""
    keys = {name.replace("__", "."): str(value) for name, value in flags.items()}
    return config_files.frozen(str(home / "config.py"), keys)


def save_checkpoint(home: Path, seed: int = 0, step: int = 1, keep: int = 1) -> None:
    """home/run, with the random weights of a seed."""
    config = config_of(home)
    mesh, data = assemble.mesh_for(config), assemble.read_sources(config, home / "run/data")
    config = assemble.resolve(config)
    tokenizers = assemble.read_tokenizers(config, home / "run", data)
    towers, tx = assemble.make_towers(config, tokenizers), optim.make(config, 1, 1)
    abstract = assemble.abstract_state(config, towers, tx, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    make = lambda: step_lib.init_params(jax.random.key(seed), towers, config)
    params = jax.jit(make, out_shardings=places)()
    contract = assemble.embedding_contract(config, tokenizers, weights_digest(params)).to_dict()
    checkpointer = Checkpointer(home / "run/checkpoints", keep)
    checkpointer.save(step, {"params": params}, {"config": to_dict(config), "contract": contract})
    checkpointer.close()
