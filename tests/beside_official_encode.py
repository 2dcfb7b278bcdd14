"""Encodes the same passages as the official code, beside it: passages a second, and the vectors.

Run by hand, with torch: `python tests/beside_official_encode.py REPOSITORY DATA.jsonl...`, the
first as for `beside_official.py`, whose towers these are. Passages are drawn from all data sets
evenly, in random order. Model, data set, collator and the loop that dumps the vectors are theirs,
ten passages at a time as in their inference. Both sides have the same random weights and the same
tokens, and are timed from tokens to vectors, on what has run once. Theirs reads a passage's vector
at padding unless it is the longest of its ten: only such vectors are compared with ours.
"""

import contextlib
import io
import json
import tempfile
import types
from pathlib import Path

import beside_official as beside
import jax
import numpy as np

from cosup_jax import assemble
from cosup_jax import step as step_lib
from cosup_jax.data import markup
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.tokens import tokenize_passages
from cosup_jax.hf import saving
from cosup_jax.search.corpus import Corpus
from cosup_jax.search.encoder import Encoder

BATCH = 10  # a number in their inference's code
READ = 4000  # passages that the tokenizer is trained on
LONGEST = 320  # tokens: rows as long as the longest passages
KEYS = {"ctx.pooling": "last", "data.ctx_rows": 4, "data.ctx_row_tokens": LONGEST}
KEYS |= {"data.max_ctx_tokens": LONGEST}


class Ours:
    """What encodes; the same in every process."""

    def __init__(self, directory: Path):
        config = beside.config(directory, **KEYS)
        mesh, data = assemble.mesh_for(config), assemble.read_sources(config, directory / "ours")
        self.tokenizers = assemble.read_tokenizers(config, directory, data)
        self.towers = assemble.make_towers(config, self.tokenizers)
        fresh = lambda key: step_lib.init_params(key, self.towers, config)
        self.params = jax.jit(fresh)(jax.random.key(0))
        ((dataset, _),) = data.train
        store = tokenize_passages(dataset, self.tokenizers.ctx, config, directory / "ours")
        self.corpus = Corpus(dataset, store, batch_shape(config))
        self.encoder = Encoder(mesh, self.towers, config)

    def vectors(self, count: int) -> np.ndarray:
        return self.encoder.corpus(self.params, self.corpus.packed(range(count)), count)


def prepare(directory: Path, sources: list[Path], count: int) -> None:
    """The tower as transformers reads it, and `count` passages as theirs reads them."""
    rng, drawn = np.random.default_rng(0), []
    for source in sources:
        lines = source.with_suffix(".passages.jsonl").read_text().splitlines()
        drawn += rng.permutation(lines)[: -(-READ // len(sources))].tolist()
    passages = [json.loads(line) for line in rng.permutation(drawn)]
    passages = [passage | {"id": f"{row:05}"} for row, passage in enumerate(passages)]
    asked = {"id": "a", "task": "open_qa", "question": "", "answers": ["."], "evidence": []}
    written = {"": [asked, asked | {"id": "b", "split": "dev"}], ".passages": passages}
    for name, rows in written.items():
        (directory / f"data{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ours = Ours(directory)
    tower, tokenizer = directory / "tower", ours.tokenizers.ctx
    tower.mkdir()
    tokenizer.save_framed(tower, markup.ctx_tail(tokenizer, "last"), 1024, text_only=True)
    saving.save(tower, ours.params["ctx"], ours.towers.ctx.arch, tokenizer.vocab_size, False)
    passages = [ours.corpus.passages[row] for row in range(count)]
    rows = [{"id": str(row), "text": markup.passage_text(p)} for row, p in enumerate(passages)]
    (directory / "passages.json").write_text(json.dumps(rows))


def ours(directory: Path, count: int) -> dict:
    side = Ours(directory)
    side.vectors(BATCH)
    clock = beside.Clock()
    vector_NxD = side.vectors(count)
    rates = clock.rates("passages", count)
    np.save(directory / "ours.npy", vector_NxD)
    return rates


def theirs(directory: Path, count: int, repository: str, threads: int) -> dict:
    torch = beside.official(repository, threads)
    from dataset.generate_dataset import DataCollator, Top100_FullEmbedDataset
    from transformers import AutoTokenizer, LlamaModel
    from utils.inference_utils import dump

    tokenizer = AutoTokenizer.from_pretrained(directory / "tower")
    given = types.SimpleNamespace(eval_docs=str(directory / "passages.json"))
    dataset = Top100_FullEmbedDataset(tokenizer, tokenizer, given)
    model = LlamaModel.from_pretrained(directory / "tower")
    how = {"batch_size": BATCH, "num_workers": 1, "collate_fn": DataCollator(tokenizer, tokenizer)}
    read = lambda part: torch.utils.data.DataLoader(part, **how)
    settings = types.SimpleNamespace(enable_fsdp=False, add_vocab=False)
    dump(model, settings, read([dataset[row] for row in range(BATCH)]), None, 1)
    clock = beside.Clock()
    found = dump(model, settings, read(dataset), None, 1)
    rates = clock.rates("passages", count)
    lengths = np.array([len(dataset[row]["input_ids"]) for row in range(count)])
    longest = [np.max(lengths[row - row % BATCH :][:BATCH]) for row in range(count)]
    whole = np.flatnonzero(lengths == longest)
    vector_NxD = np.array([found[str(row)] for row in whole])
    vector_NxD /= np.linalg.norm(vector_NxD, axis=1, keepdims=True)
    ours_NxD = np.load(directory / "ours.npy")[whole]
    difference = float(np.abs(vector_NxD - ours_NxD).max())
    padding = 1 - float(lengths.sum() / np.sum(longest))
    about = {"tokens": float(lengths.mean()), "padding": padding, "compared": len(whole)}
    return rates | about | {"difference": difference}


def main() -> None:
    parser = beside.arguments(__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=300, help="how many, a multiple of ten")
    args = parser.parse_args()
    if args.side:
        whose = (args.repository, int(args.side)) if args.side != "ours" else ()
        with contextlib.redirect_stdout(io.StringIO()):
            found = (theirs if whose else ours)(args.data[0], args.passages, *whose)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args.data, args.passages)
        found = beside.in_turn(args, Path(name), f"--passages={args.passages}")
    beside.compare(found, ("passages_per_s", "passages_per_core_s", "peak_mib"))
    furthest = max(run.get("difference", 0) for runs in found.values() for run in runs)
    print(f"largest difference of the vectors: {furthest:.1e}")


if __name__ == "__main__":
    main()
