"""What Hugging Face calls our leaves: one table a family, read in either direction.

Letters: N layers, D width, H query heads, G kv heads, E head_dim, F mlp width, V vocabulary,
P positions, K token types, # stands for q, k, v.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Tensor(NamedTuple):
    """Where one of our leaves lies in a file. Groups of letters are the axes of the file."""

    name: str  # {} is the layer
    ours: str  # our axes, the layer axis aside
    theirs: str  # the file's axes: "HE D" is a matrix [H * E, D]
    part: int = 0  # which of q, k, v, where the file holds the three in one tensor


def _table(*rows: tuple[str, str, str]) -> dict[str, Tensor]:
    """Tensors without a kin, as they lie in the file."""
    return {leaf: Tensor(name, axes.replace(" ", ""), axes) for leaf, name, axes in rows}


def _norm(leaf: str, name: str, bias: bool = True) -> dict[str, Tensor]:
    found = {f"{leaf}/scale": Tensor(f"{name}.weight", "D", "D")}
    return found | ({f"{leaf}/bias": Tensor(f"{name}.bias", "D", "D")} if bias else {})


def _linear(
    leaf: str, name: str, spec: str, bias: bool = True, conv: bool = False, part: int = 0
) -> dict[str, Tensor]:
    """A layer "in>out", which the file holds as [out, in], or as [in, out] where it is a Conv1D."""
    inputs, outputs = spec.split(">")
    theirs = f"{inputs} {outputs}" if conv else f"{outputs} {inputs}"
    own = outputs.replace("#", "")
    found = {leaf: Tensor(f"{name}.weight", inputs + own, theirs, part)}
    return found | ({f"{leaf}_bias": Tensor(f"{name}.bias", own, outputs, part)} if bias else {})


def _fused(name: str, spec: str, conv: bool = False) -> dict[str, Tensor]:
    """q, k and v in one tensor."""
    q = _linear("blocks/attn/q", name, spec, conv=conv, part=0)
    k = _linear("blocks/attn/k", name, spec.replace("H", "G"), conv=conv, part=1)
    return q | k | _linear("blocks/attn/v", name, spec.replace("H", "G"), conv=conv, part=2)


def _llama_table(attention_bias: bool = False) -> dict[str, Tensor]:
    attn, mlp = "layers.{}.self_attn", "layers.{}.mlp"
    return {
        **_table(("embed/table", "embed_tokens.weight", "V D")),
        **_norm("blocks/attn_norm", "layers.{}.input_layernorm", bias=False),
        **_linear("blocks/attn/q", f"{attn}.q_proj", "D>HE", attention_bias),
        **_linear("blocks/attn/k", f"{attn}.k_proj", "D>GE", attention_bias),
        **_linear("blocks/attn/v", f"{attn}.v_proj", "D>GE", attention_bias),
        **_linear("blocks/attn/o", f"{attn}.o_proj", "HE>D", bias=False),
        **_norm("blocks/mlp_norm", "layers.{}.post_attention_layernorm", bias=False),
        **_linear("blocks/mlp/gate", f"{mlp}.gate_proj", "D>F", bias=False),
        **_linear("blocks/mlp/up", f"{mlp}.up_proj", "D>F", bias=False),
        **_linear("blocks/mlp/down", f"{mlp}.down_proj", "F>D", bias=False),
        **_norm("final_norm", "norm", bias=False),
        **_linear("head/kernel", "lm_head", "D>V", bias=False),
    }


_LLAMA, _QWEN2 = _llama_table(), _llama_table(attention_bias=True)
_QWEN3 = _LLAMA | _table(
    ("blocks/attn/q_norm/scale", "layers.{}.self_attn.q_norm.weight", "E"),
    ("blocks/attn/k_norm/scale", "layers.{}.self_attn.k_norm.weight", "E"),
)
_GPT2 = {
    **_table(("embed/table", "wte.weight", "V D"), ("embed/positions", "wpe.weight", "P D")),
    **_norm("blocks/attn_norm", "h.{}.ln_1"),
    **_fused("h.{}.attn.c_attn", "D>#HE", conv=True),
    **_linear("blocks/attn/o", "h.{}.attn.c_proj", "HE>D", conv=True),
    **_norm("blocks/mlp_norm", "h.{}.ln_2"),
    **_linear("blocks/mlp/up", "h.{}.mlp.c_fc", "D>F", conv=True),
    **_linear("blocks/mlp/down", "h.{}.mlp.c_proj", "F>D", conv=True),
    **_norm("final_norm", "ln_f"),
    **_linear("head/kernel", "lm_head", "D>V", bias=False),
}
_NEOX = {
    **_table(("embed/table", "embed_in.weight", "V D")),
    **_norm("blocks/attn_norm", "layers.{}.input_layernorm"),
    **_fused("layers.{}.attention.query_key_value", "D>H#E"),
    **_linear("blocks/attn/o", "layers.{}.attention.dense", "HE>D"),
    **_norm("blocks/mlp_norm", "layers.{}.post_attention_layernorm"),
    **_linear("blocks/mlp/up", "layers.{}.mlp.dense_h_to_4h", "D>F"),
    **_linear("blocks/mlp/down", "layers.{}.mlp.dense_4h_to_h", "F>D"),
    **_norm("final_norm", "final_layer_norm"),
    **_linear("head/kernel", "embed_out", "D>V", bias=False),
}
_BERT = {
    **_table(
        ("embed/table", "embeddings.word_embeddings.weight", "V D"),
        ("embed/positions", "embeddings.position_embeddings.weight", "P D"),
        ("embed/types", "embeddings.token_type_embeddings.weight", "K D"),
    ),
    **_norm("embed/norm", "embeddings.LayerNorm"),
    **_linear("blocks/attn/q", "encoder.layer.{}.attention.self.query", "D>HE"),
    **_linear("blocks/attn/k", "encoder.layer.{}.attention.self.key", "D>GE"),
    **_linear("blocks/attn/v", "encoder.layer.{}.attention.self.value", "D>GE"),
    **_linear("blocks/attn/o", "encoder.layer.{}.attention.output.dense", "HE>D"),
    **_norm("blocks/attn_norm", "encoder.layer.{}.attention.output.LayerNorm"),
    **_linear("blocks/mlp/up", "encoder.layer.{}.intermediate.dense", "D>F"),
    **_linear("blocks/mlp/down", "encoder.layer.{}.output.dense", "F>D"),
    **_norm("blocks/mlp_norm", "encoder.layer.{}.output.LayerNorm"),
}


class Layout(NamedTuple):
    """How the checkpoints of a family are laid out."""

    body: str  # prefix of all but the head in a model with a head; a bare model has none
    table: dict[str, Tensor]  # our leaf -> the file's tensor, named without the body's prefix
    models: tuple[str, str]  # transformers' classes, with and without a head
    ignored: tuple[str, ...] = ()  # patterns of what a file may hold beside

    @property
    def head(self) -> str:
        """The file's name of the output head; empty for an encoder."""
        return self.table[HEAD].name if HEAD in self.table else ""


def _llama(table: dict[str, Tensor], name: str) -> Layout:
    models = (f"{name}ForCausalLM", f"{name}Model")
    return Layout("model.", table, models, ("layers.*.rotary_emb.inv_freq",))


_NEOX_LAYOUT = Layout(
    "gpt_neox.",
    _NEOX,
    ("GPTNeoXForCausalLM", "GPTNeoXModel"),
    ("layers.*.attention.bias", "layers.*.attention.masked_bias", "layers.*.inv_freq"),
)
LAYOUTS = {  # by our family
    "llama": _llama(_LLAMA, "Llama"),
    "mistral": _llama(_LLAMA, "Mistral"),
    "qwen2": _llama(_QWEN2, "Qwen2"),
    "qwen3": _llama(_QWEN3, "Qwen3"),
    "gpt2": Layout(
        "transformer.",
        _GPT2,
        ("GPT2LMHeadModel", "GPT2Model"),
        ("h.*.attn.bias", "h.*.attn.masked_bias"),
    ),
    "gpt_neox": _NEOX_LAYOUT,
    "gpt_neox_serial": _NEOX_LAYOUT,
    "bert": Layout(
        "bert.",
        _BERT,
        ("BertForMaskedLM", "BertModel"),
        ("pooler.*", "cls.*", "embeddings.position_ids"),
    ),
}
HEAD, TABLE = "head/kernel", "embed/table"


def unfrozen(name: str) -> str:
    """The leaf's name in the tables, which do not know of freezing."""
    return name.removeprefix("frozen_")


def layers_of(name: str, leaves: Mapping[str, Any]) -> range | None:
    """Which layers of the file a stacked leaf holds; the frozen ones are the lowest."""
    if "blocks/" not in name:
        return None
    frozen = leaves.get(f"frozen_{name}")
    start = 0 if frozen is None else frozen.shape[0]
    return range(start, start + leaves[name].shape[0])


def axes(source: str, target: str) -> list[int]:
    """The order of `source`'s letters that gives `target`."""
    return [source.index(letter) for letter in target]
