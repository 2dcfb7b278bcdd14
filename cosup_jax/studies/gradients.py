"""Do the two losses pull Gen the same way, layer by layer, and which one pulls more?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from cosup_jax import cosup, sharding
from cosup_jax import step as step_lib
from cosup_jax.config import Config
from cosup_jax.data import pipeline
from cosup_jax.data.batch import Batch
from cosup_jax.data.plan import Plan
from cosup_jax.step import Skipped, TrainState
from cosup_jax.studies import run as run_lib
from cosup_jax.studies.run import COSINE, POSITIVE, Gives, Metrics, Run, Scores
from cosup_jax.towers import Towers

GIVES: Gives = {
    r"gradient_cosine/(gen|embed|head|final_norm|layer_\d+)/step_\d+": COSINE,
    r"gradient_ratio/step_\d+": POSITIVE,
}
BATCHES = 4  # that come next in training


def gradients(run: Run) -> Scores:
    """Of every kept checkpoint, `NAME/step_N`; of each of the batches that come next in training:

    gradient_cosine/PART  in -1..1, of NTP's gradient with NSP's; PART is `layer_0`, ..., `embed`,
                          `head`, `final_norm`, or `gen`: all. A part that either loss does not
                          reach has none, as NSP does not reach an untied head
    gradient_ratio        NSP's gradient in all of Gen over NTP's, times the weights as they then
                          are; of an arm that trains on both

    Both losses are taken as if both were trained, of what is not frozen, and without a bank.
    """
    found: Metrics = {}
    for at in run_lib.over_training(run):
        for name, values in _of_next_batches(at).items():
            found[f"{name}/step_{at.trained.step}"] = values
    return {"": found}


def _of_next_batches(run: Run) -> Metrics:
    trained = run.trained
    config, rows, loss = trained.config, sharding.rows(trained.mesh), trained.config.loss
    plan, found = Plan(run.store, config), {}
    of_batch = _products(trained.mesh, trained.towers, config, trained.tokenizers.gen.pad)
    for step in range(trained.step, trained.step + BATCHES):
        batch = pipeline.batch_at(run.store, plan, config, rows, rows, step)
        with jax.set_mesh(trained.mesh):
            parts = jax.device_get(of_batch(trained.params, step, batch))
        reached = {name: three for name, three in parts.items() if min(three[1:]) > 0}
        values = {
            f"gradient_cosine/{name}": dot / (ntp * nsp) ** 0.5
            for name, (dot, ntp, nsp) in reached.items()
        }
        if "gen" in reached and loss.ntp_weight and loss.trains_nsp:
            _, ntp, nsp = reached["gen"]
            weight = cosup.nsp_weight(step, loss) / loss.ntp_weight
            values["gradient_ratio"] = weight * (nsp / ntp) ** 0.5
        for name, value in values.items():
            found.setdefault(name, {})[f"step_{step}"] = float(value)
    return found


@functools.lru_cache(maxsize=2)
def _products(mesh: Mesh, towers: Towers, config: Config, pad_id: int):
    """`products` on the mesh, compiled once for all checkpoints of a run."""
    loss = dataclasses.replace(config.loss, ntp_weight=1.0, nsp_weight=1.0)
    config = dataclasses.replace(config, loss=loss)
    return jax.jit(
        lambda params, step, batch: products(params, step, batch, towers, config, pad_id),
        out_shardings=sharding.replicated(mesh),
    )


def products(params: dict, step, batch: Batch, towers: Towers, config: Config, pad_id: int):
    """{part of Gen: (NTP . NSP, NTP . NTP, NSP . NSP)} of the two gradients, float32."""
    zero = jnp.int32(0)
    state = TrainState(step, params, None, None, None, Skipped(zero, zero), None)

    def both(trained):
        terms = step_lib.objective(trained, state, batch, towers, config, pad_id)[1]
        return terms.ntp, terms.nsp

    _, pull = jax.vjp(both, step_lib.trainable(params, config))
    one, none = jnp.float32(1), jnp.float32(0)
    of_ntp, of_nsp = (
        flatten_dict(pull(weights)[0].get("gen", {})) for weights in ((one, none), (none, one))
    )
    found: dict[str, tuple] = {}

    def add(name, *three):
        found[name] = tuple(map(sum, zip(found.get(name, (0.0,) * 3), three, strict=True)))

    for path, ntp in of_ntp.items():
        nsp = of_nsp[path]
        pairs = [(ntp, nsp), (ntp, ntp), (nsp, nsp)]
        add("gen", *(jnp.vdot(a, b) for a, b in pairs))
        if path[0] == "blocks":  # the layers are its first axis; frozen ones lie below it
            sums_3xN = [jnp.sum(a * b, axis=tuple(range(1, a.ndim))) for a, b in pairs]
            for layer in range(len(ntp)):
                number = layer + towers.gen.arch.frozen_layers
                add(f"layer_{number}", *(sums_N[layer] for sums_N in sums_3xN))
        else:
            add(path[0], *(jnp.vdot(a, b) for a, b in pairs))
    return found
