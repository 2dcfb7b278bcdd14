"""Trains on the same examples as the official code, beside it: examples a second, peak memory.

Run by hand, with torch: `python tests/beside_official.py REPOSITORY DATA.jsonl`, the first being a
checkout of kaistAI/Semiparametric_Token-Sequence_Co-Supervision, the second a data set in our
format. Model, data set and collator are theirs; the loop does what theirs does: eight examples a
step, Gen's body clipped, AdamW. Both sides read every example once, in turn, each in a process of
its own; the first step, compilation included, is not counted. What makes theirs run on a CPU: no
FSDP; all_gather off, as one rank alone crashes in it; a device number for its prints; stubs of
what it imports in vain; and two keys taken out of the batch, which its collator makes and its model
does not know.
"""

import argparse
import contextlib
import importlib.machinery
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import jax

from cosup_jax import assemble, optim, sharding
from cosup_jax import step as step_lib
from cosup_jax.config import Config, make
from cosup_jax.data import markup, pipeline, tokenizer, tokens
from cosup_jax.data.plan import Plan
from cosup_jax.freeze import freeze

LAYERS, WIDTH, HEADS, MLP, VOCAB, EXAMPLES = 8, 512, 8, 1344, 8192, 8  # the last: of a step
ARCH = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "kv_heads": HEADS, "mlp_width": MLP}
SHAPE = {  # about eight examples of SQuAD a step
    "batch_size": 4,
    "data.max_gen_tokens": 416,
    "data.max_ctx_tokens": 304,
    "data.ctx_rows": 2,
    "data.ctx_row_tokens": 640,
    "data.vocab_size": VOCAB - len(tokenizer.ADDED),
    "gen.arch.tie_embeddings": False,
    **dict.fromkeys(("gen.arch.remat", "ctx.arch.remat"), "dots"),
    **{f"gen.arch.{key}": value for key, value in ARCH.items()},
}


def config(directory: Path, **keys) -> Config:
    source = dict.fromkeys(("data.train", "data.eval"), str(directory / "data.jsonl"))
    return assemble.resolve(freeze(make({"num_epochs": 1, **SHAPE, **source, **keys}, {})))


def prepare(directory: Path, source: Path, count: int) -> None:
    """The first `count` training examples, as either side reads them."""
    lines = source.read_text().splitlines(keepends=True)
    train = [line for line in lines if json.loads(line)["split"] == "train"][:count]
    held_out = next(line for line in lines if json.loads(line)["split"] != "train")
    (directory / "data.jsonl").write_text("".join([*train, held_out]))
    passages = source.with_suffix(".passages.jsonl").read_text()
    (directory / "data.passages.jsonl").write_text(passages)
    data = assemble.read_sources(config(directory), directory / "ours")
    assemble.read_tokenizers(config(directory), directory, data)
    (saved,) = directory.glob("tokenizer/*/tokenizer.json")
    plain = json.loads(saved.read_text())
    plain["added_tokens"] = [t for t in plain["added_tokens"] if t["content"] == tokenizer.EOS]
    ((dataset, _),) = data.train
    rows = {"input": [], "output": [], "evidence": [], "input_ids": []}
    for example in dataset.rows("train"):
        prompt, *body = markup.pieces(example, dataset.passages)
        marks = {"ret": f"[k_{example.evidence[0]}]", "cs": "[Cs]", "ce": "[Ce]", "eos": ""}
        output = "".join(piece.text or marks[piece.control] for piece in body)
        for key, value in zip(rows, (prompt.text, output, example.evidence, []), strict=True):
            rows[key].append(value)
    texts = {f"[k_{id}]": markup.passage_text(p) for id, p in dataset.passages.items()}
    for name, made in (("tokenizer", plain), ("data", rows), ("ids2text", texts)):
        (directory / f"{name}.json").write_text(json.dumps(made))


def ours(directory: Path):
    """Yields examples and supervised tokens after every step of an epoch."""
    c = config(directory)
    mesh = assemble.mesh_for(c)
    data = assemble.read_sources(c, directory / "ours")
    tokenizers = assemble.read_tokenizers(c, directory, data)
    store = tokens.tokenize(data.train, *tokenizers, c, directory / "ours")
    plan, rows = Plan(store, c), sharding.rows(mesh)
    steps, offsets = plan.total_steps(1), plan.block(0).example_offsets
    towers, tx = assemble.make_towers(c, tokenizers), optim.make(c, steps, 0)
    state = assemble.abstract_state(c, towers, tx, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step_fn = step_lib.compile_step(mesh, places, towers=towers, tx=tx, config=c)
    state = assemble.initial_state(c, towers, tokenizers, tx, state)
    for step, batch in enumerate(pipeline.batches(store, plan, c, rows, rows, 0, steps)):
        state, metrics = step_fn(state, batch)
        yield int(offsets[step + 1] - offsets[step]), int(metrics["ntp/tokens"])


def official(repository: str, threads: int):
    """Makes a checkout of theirs importable on a CPU; returns torch."""
    import torch

    for name in ("pandas", "fire", "datasets"):  # imported there, and not used here
        spec = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.modules["datasets"].load_dataset = None
    sys.path.insert(0, repository)
    torch.cuda.current_device = lambda: 0
    torch.set_num_threads(threads)
    return torch


def theirs(directory: Path, repository: str, threads: int):
    """The same of theirs; padding, which it supervises too, is left out of the count."""
    torch = official(repository, threads)
    from dataset.generate_dataset import train_data_module
    from model.joint_modeling_llama import JointModel
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    file = str(directory / "tokenizer.json")
    fast = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="</s>", model_max_length=1024)
    fast.add_special_tokens({"pad_token": "<PAD>"})
    for names in (["[Cs]", "[Ce]"], ["[Ret]"]):
        fast.add_special_tokens({"additional_special_tokens": names})
    given = {"train_data_path": "data.json", "train_ids2text": "ids2text.json"}
    given = {name: str(directory / file) for name, file in given.items()}
    given |= {"loss_mask_context": "no_mask", "train_sample": -1, "allow_noret": True}
    made = train_data_module(fast, fast, types.SimpleNamespace(**given, put_hardneg=False))
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": MLP}
    shape = LlamaConfig(vocab_size=len(fast), hidden_size=WIDTH, **shape)
    model = JointModel(shape, types.SimpleNamespace(single=False, all_gather=False, np_weight=100))
    model.set_vanilla_vocab_size(len(fast))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    how = {"batch_size": EXAMPLES, "shuffle": True, "num_workers": 1, "drop_last": True}
    how["collate_fn"] = made["data_collator"]
    for batch in torch.utils.data.DataLoader(made["train_dataset"], **how):
        del batch["mask_idx"], batch["alce_idx"]
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        real = batch["labels"].ne(-100) & batch["attention_mask"]
        yield EXAMPLES, int(real[:, 1:].sum())


class Clock:
    """Seconds since it was made, of the clock and of all cores."""

    def __init__(self):
        self._start_s, self._cores_s = time.perf_counter(), time.process_time()

    def rates(self, what: str, count: int) -> dict[str, float]:
        """Of `count` of something done since then; and the most memory that was held."""
        cores_s, clock_s = time.process_time() - self._cores_s, time.perf_counter() - self._start_s
        status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's peak too
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        rates = {f"{what}_per_s": count / clock_s, f"{what}_per_core_s": count / cores_s}
        return rates | {"peak_mib": peak, "load": os.getloadavg()[0]}


def timed(side: str, directory: Path, repository: str) -> dict:
    """One side's epoch; `side` is ours, or theirs by its number of threads."""
    run = ours(directory) if side == "ours" else theirs(directory, repository, int(side))
    with contextlib.redirect_stdout(io.StringIO()):
        next(run)
        clock, done = Clock(), list(run)
    found = {"steps": len(done), "examples": sum(count for count, _ in done)}
    rates = clock.rates("examples", found["examples"])
    return found | {"supervised": sum(n for _, n in done)} | rates


def arguments(what: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("repository")
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", default="1,2", help="of theirs, which runs with each")
    parser.add_argument("--side", help="runs that side alone, on data that is prepared")
    return parser


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(timed(args.side, args.data[0], args.repository)))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args.data[0], args.examples)
        compare(in_turn(args, Path(name)), ("examples_per_s", "examples_per_core_s", "peak_mib"))


def in_turn(args: argparse.Namespace, directory: Path, *flags: str) -> dict[str, list[dict]]:
    """What the sides print, ours and theirs by its number of threads, `args.turns` times each."""
    found = {"ours": [], **{threads: [] for threads in args.threads.split(",")}}
    for _, side in ((turn, side) for turn in range(args.turns) for side in found):
        command = [sys.executable, sys.argv[0], args.repository, str(directory), *flags]
        command.append(f"--side={side}")
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[side].append(json.loads(done.stdout.splitlines()[-1]))
        print(side, done.stdout.splitlines()[-1], flush=True)
    return found


def compare(found: dict[str, list[dict]], keys: tuple[str, ...]) -> None:
    """Prints medians; theirs is that of its faster number of threads, by the first key."""
    median = lambda side, key: statistics.median(run[key] for run in found[side])
    best = max(found.keys() - {"ours"}, key=lambda side: median(side, keys[0]))
    for key in keys:
        one, other = median("ours", key), median(best, key)
        print(
            f"{key}: ours {one:.3g}, theirs {other:.3g} ({best} threads): {one / other:.2f} of it"
        )


if __name__ == "__main__":
    main()
