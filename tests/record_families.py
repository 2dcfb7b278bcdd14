"""Writes goldens/families.npz: what Hugging Face's models compute for the cases of families.py.

Run by hand, needs torch: `python tests/record_families.py`.
"""

import json
import platform
import tempfile
from pathlib import Path

import families
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file


def build(name: str) -> tuple[transformers.PreTrainedModel, dict[str, list[int]]]:
    """The case in float32 on the CPU, and its tensors' shapes as save_pretrained names them."""
    auto = transformers.AutoModelForCausalLM if name in families.CAUSAL else transformers.AutoModel
    with tempfile.TemporaryDirectory() as directory:
        families.write(Path(directory), name, {})
        config = transformers.AutoConfig.from_pretrained(directory)
        auto.from_config(config).save_pretrained(directory)
        tensors = load_file(Path(directory) / "model.safetensors")
        shapes = {tensor: list(array.shape) for tensor, array in sorted(tensors.items())}
        families.write(Path(directory), name, shapes)
        eager = {"attn_implementation": "eager", "dtype": torch.float32}
        return auto.from_pretrained(directory, **eager).eval(), shapes


def to_numpy(output) -> list[np.ndarray]:
    """Final hidden states and, where there is a head, logits."""
    parts = [output.hidden_states[-1], *([output.logits] if "logits" in output else [])]
    return [part.detach().numpy() for part in parts]


def record() -> dict[str, np.ndarray]:
    tokens, real = families.rows()
    shapes, arrays = {}, {}
    for name in families.CASES:
        model, shapes[name] = build(name)
        with torch.no_grad():
            output = model(
                torch.tensor(tokens),
                attention_mask=torch.tensor(real.astype(int)),
                output_hidden_states=True,
            )
        excerpt = families.excerpt(real, *to_numpy(output))
        arrays |= {f"{name}/{part}": array for part, array in excerpt.items()}
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"made_by": made_by | {"python": platform.python_version()}, "shapes": shapes}
    return {"about": np.array(json.dumps(about)), **arrays}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "goldens" / "families.npz", **record())
