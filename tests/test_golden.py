"""The official code's own numbers: ntp, nsp, total and gradient norms of two small cases.

`goldens/*/case.json` was printed by the official PyTorch code; one rank, no padding.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import config
from safetensors.numpy import load_file

from cosup_jax import cosup, official
from cosup_jax.config import ArchConfig
from cosup_jax.data.batch import BatchShape, empty_batch
from cosup_jax.dotted import replace_dotted
from cosup_jax.model.transformer import Transformer, padded_vocab
from cosup_jax.towers import Towers

GOLDENS = Path(__file__).parent / "goldens"
# our leaf -> official tensor name; a leaf under "blocks" stands for one tensor a layer
NAMES = {
    "embed/table": "embed_tokens",
    "final_norm/scale": "norm",
    "head/kernel": "lm_head",
    "blocks/attn_norm/scale": "input_layernorm",
    "blocks/mlp_norm/scale": "post_attention_layernorm",
    **{f"blocks/attn/{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"blocks/mlp/{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def _load(directory: Path, arch: ArchConfig, vocab: int, head: bool) -> dict:
    """Torch's [out, in] tensors in our layout, written out by hand."""
    tensors = {
        k.removeprefix("model."): v for k, v in load_file(directory / "model.safetensors").items()
    }
    abstract = jax.eval_shape(Transformer(arch, vocab, head).init, jax.random.key(0))

    def leaf(path, target):
        name = "/".join(key.key for key in path)
        if not name.startswith("blocks"):
            value = tensors[NAMES[name] + ".weight"]
            if value.ndim == 2:
                value = np.pad(value, ((0, padded_vocab(vocab) - vocab), (0, 0)))
            return jnp.asarray(value.T if name == "head/kernel" else value)
        layers = [tensors[f"layers.{i}.{NAMES[name]}.weight"].T for i in range(arch.layers)]
        return jnp.asarray(np.stack(layers).reshape(target.shape))

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def _case(name: str):
    root = GOLDENS / name
    case = json.loads((root / "case.json").read_text())
    hf = json.loads((root / "gen" / "config.json").read_text())
    arch = ArchConfig(
        layers=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        mlp_width=hf["intermediate_size"],
        rope_theta=hf["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=False,
    )
    vocab = hf["vocab_size"]
    towers = Towers(
        Transformer(arch, vocab), Transformer(arch, vocab, has_head=False), tied=case["single"]
    )
    params = {"gen": _load(root / "gen", arch, vocab, head=True), "nsp": {}}
    if not case["single"]:
        params["ctx"] = _load(root / "ctx", arch, vocab, head=False)
    return case, towers, params, _batch(case)


def _batch(case: dict):
    """One example a row, one passage a Ctx row, slot (b, r) at Ctx row b * R + r."""
    ids, labels = np.array(case["input_ids"]), np.array(case["labels"])
    (B, T), R = ids.shape, max(map(len, case["ret_positions"]))
    shape = BatchShape(B, T, R, 1, B * R, len(case["passage_ids"][0]), 1)
    batch = empty_batch(shape, B, B * R)
    batch.gen_tokens_BxT[:], batch.gen_segments_BxT[:] = ids, 1
    batch.gen_positions_BxT[:] = np.arange(T)
    batch.ntp_targets_BxT[:, :-1] = np.maximum(labels[:, 1:], 0)
    batch.ntp_weights_BxT[:, :-1] = labels[:, 1:] != -100
    passages = iter(case["passage_ids"])
    for b, positions in enumerate(case["ret_positions"]):
        for r, position in enumerate(positions):
            u = b * R + r
            batch.ret_positions_BxR[b, r], batch.ret_valid_BxR[b, r] = position, True
            batch.ctx_tokens_UxL[u], batch.ctx_segments_UxL[u] = next(passages), 1
            batch.ctx_positions_UxL[u] = np.arange(shape.L)
            batch.passage_ends_UxP[u], batch.passage_valid_UxP[u] = shape.L - 1, True
            batch.passage_ids_UxPx2[u, 0] = batch.ret_positives_BxRxSx2[b, r, 0] = u + 1, 1
    return batch


def _norms(grads: dict, layers: int) -> dict[str, float]:
    """Gradient norms under the official names."""
    found = {}
    for tower, prefix in (("gen", "gen.model."), ("ctx", "ctx.")):
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads.get(tower, {})):
            name = "/".join(key.key for key in path)
            if name == "head/kernel":
                found["gen.lm_head.weight"] = jnp.linalg.norm(leaf)
            elif name.startswith("blocks"):
                for i in range(layers):
                    found[f"{prefix}layers.{i}.{NAMES[name]}.weight"] = jnp.linalg.norm(leaf[i])
            else:
                found[f"{prefix}{NAMES[name]}.weight"] = jnp.linalg.norm(leaf)
    return found


@pytest.mark.parametrize("name", ["public_mha", "public_gqa_tied"])
@pytest.mark.parametrize("objective", ["ours", "official"])
def test_the_official_numbers(name, objective):
    """Bugs: a wrong rotary layout, head grouping or shift of the targets; a wrong loss weight;
    a lost or doubled gradient path. Without padding both objectives must give the same."""
    case, towers, params, batch = _case(name)
    c = config(loss__normalize=False, loss__temperature=1.0)
    c = replace_dotted(c, "loss.nsp_weight", 1 / case["np_weight"])

    def loss(params):
        if objective == "official":
            return official.loss(params, batch, towers, 0, c)
        return cosup.loss(params, batch, None, jnp.int32(0), towers, c)

    (total, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(aux.metrics["ntp/nats_per_token"], case["ntp_loss"], rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["nsp/nats_per_ret"], case["nsp_loss"], rtol=1e-5)
    np.testing.assert_allclose(total, case["loss"], rtol=1e-5)
    norms = _norms(grads, towers.gen.arch.layers)
    assert norms.keys() == case["grad_norms"].keys()
    for key, expected in case["grad_norms"].items():
        np.testing.assert_allclose(norms[key], expected, rtol=1e-5, err_msg=key)
