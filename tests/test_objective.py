"""The objective as a whole against loops written from the paper: on one device and on eight, in
slices and in tiles, with and without a bank, packed or not."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import Lookup, assert_close, config, random_batch, towers
from oracle import objective

from cosup_jax import bank as bank_lib
from cosup_jax import cosup, sharding
from cosup_jax import step as step_lib
from cosup_jax.config import MeshConfig
from cosup_jax.data.batch import batch_shape
from cosup_jax.towers import Towers

MESHES = [(1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)]
BANKS = ["off", "passage", "dual"]
SLICES = [1, 4]
TILES = [0.0, 0.002]  # MiB: all at once, and a few columns or tokens at a time
CONTENTS = list(itertools.product((True, False), (True, False)))  # packing, hard negatives
STEP, VOCAB, WIDTH = 4, 40, 8


def _config(bank_kind: str = "off", slices: int = 1, tile: float = 0.0, **keys):
    return config(
        batch_size=32,
        data__ctx_rows=32,
        micro_batches=slices,
        loss__tile_mib=tile,
        loss__learn_temperature=True,
        bank__kind=bank_kind,
        bank__size=4 * 64,
        bank__queries=2 * 96,
        bank__max_age=2,
        **keys,
    )


@functools.cache
def _vectors():
    """Towers that look their hidden states up: the objective on bare vectors."""
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    params = {
        "gen": {
            "embed": {"table": draw(0, VOCAB, WIDTH)},
            "head": {"kernel": draw(1, WIDTH, 48)},
        },
        "ctx": {"embed": {"table": draw(2, VOCAB, WIDTH)}},
        "nsp": {"log_temperature": jnp.log(jnp.float32(0.3))},
    }
    return Towers(Lookup(VOCAB), Lookup(VOCAB)), params, None


@functools.cache
def _transformers():
    t = towers()
    params = jax.jit(lambda: step_lib.init_params(jax.random.key(0), t, _config()))()
    return t, params, step_lib.param_axes(t, _config())


@functools.cache
def _filled(make, bank_kind: str):
    """A bank that four steps have filled; half of what they wrote is live again in `_batch`."""
    (t, params, _), c = make(), _config(bank_kind)
    width = t.ctx.arch.width if make is _transformers else WIDTH
    bank = bank_lib.init(c.bank, batch_shape(c), width)
    read = jax.jit(lambda batch, step: cosup.terms(params, batch, None, step, t, c))
    for past in range(STEP) if bank else ():
        found = read(_batch(c, t, True, True, seed=past), past)
        bank = bank_lib.fill(bank, found.live, found.asked, jnp.int32(past), jnp.bool_(True))
    return bank


def _batch(c, t, packing: bool, hard: bool, seed: int = STEP):
    """On 8 x 1 x 1 the first device has no [Ret]; some passages are those of earlier batches."""
    draw = functools.partial(random_batch, vocab=min(t.gen.vocab_size, VOCAB))
    batch = draw(seed, batch_shape(c), (0, 1, 2, 3), packing, hard)
    past = draw(max(seed - 2, 0), batch_shape(c))
    again_UxP = batch.passage_valid_UxP & past.passage_valid_UxP
    again_UxP[:8] = again_UxP[-1] = False
    for u, p in np.argwhere(again_UxP):
        before, after = batch.passage_ids_UxPx2[u, p].copy(), past.passage_ids_UxPx2[u, p]
        batch.passage_ids_UxPx2[u, p] = after
        positives = batch.ret_positives_BxRxSx2
        positives[(positives == before).all(-1)] = after
    return batch


@functools.cache
def _expected(make, bank_kind: str, packing: bool, hard: bool, keys: tuple = ()):
    (t, params, _), c = make(), _config(bank_kind, **dict(keys))
    return objective(params, _batch(c, t, packing, hard), _filled(make, bank_kind), STEP, t, c)


def _check(make, mesh_shape, bank_kind, slices, tile, contents, keys: tuple = ()):
    t, params, axes = make()
    c, bank = _config(bank_kind, slices, tile, **dict(keys)), _filled(make, bank_kind)
    mesh = sharding.make_mesh(MeshConfig(*mesh_shape), jax.devices()[: math.prod(mesh_shape)])
    axes = axes or jax.tree.map(lambda x: (None,) * x.ndim, params)
    places = sharding.tree_shardings(mesh, axes, params)
    bank_places = bank and sharding.tree_shardings(mesh, bank_lib.logical_axes(bank), bank)
    gradient = jax.jit(
        jax.value_and_grad(lambda p, b, k, s: cosup.loss(p, b, k, s, t, c)[0]),
        in_shardings=(places, sharding.rows(mesh), bank_places, sharding.replicated(mesh)),
        out_shardings=(sharding.replicated(mesh), places),
    )
    for packing, hard in contents:
        with jax.set_mesh(mesh):
            found = gradient(params, _batch(c, t, packing, hard), bank, STEP)
        assert_close(jax.block_until_ready(found), _expected(make, bank_kind, packing, hard, keys))


_GRID = list(itertools.product(MESHES, BANKS, SLICES, TILES))


def _grid(covered):
    """The grid; what is not covered is slow."""
    slow = lambda case: pytest.param(*case, marks=pytest.mark.slow)
    cases = [case if covered(*case) else slow(case) for case in _GRID]
    return pytest.mark.parametrize("mesh_shape,bank_kind,slices,tile", cases, ids=str)


def _halves(mesh_shape, bank_kind, slices, tile) -> bool:
    """Half of the slices and tiles for each mesh and bank; any three settings meet."""
    places = MESHES.index(mesh_shape), BANKS.index(bank_kind), SLICES.index(slices)
    return (sum(places) + TILES.index(tile)) % 2 == 0


@_grid(_halves)
def test_vectors_equal_the_loops(mesh_shape, bank_kind, slices, tile):
    """Bugs: negatives of one shard, slice or tile only; gradients cut at the gather or scaled by
    the number of devices; a copy of the positive, a sibling, or a live, old or doubly stored bank
    entry as negative; a device without any [Ret] that stops the others."""
    _check(_vectors, mesh_shape, bank_kind, slices, tile, CONTENTS)


@functools.cache
def _tied():
    """One table for both roles."""
    t, params, _ = _vectors()
    return Towers(t.gen, t.ctx, tied=True), {k: params[k] for k in ("gen", "nsp")}, None


@pytest.mark.parametrize("bank_kind", ["off", "dual"])
def test_tied_towers_equal_the_loops(bank_kind):
    """Bug: the gradient of one of the two roles lost."""
    _check(_tied, (4, 2, 1), bank_kind, 4, TILES[1], CONTENTS[:1])


OTHERS = {
    "sigmoid": (("loss__contrastive", "sigmoid"), ("loss__sigmoid_bias", -2.0)),
    "margin": (("loss__margin_mask", True), ("loss__margin", 0.2)),
    "by_position": (("loss__identity_mask", False),),
    "raw": (("loss__normalize", False), ("loss__nsp_weight", 0.01)),
    "ramp": (("loss__nsp_ramp_steps", 8), ("loss__nsp_ramp_from", 0.25)),
}


@pytest.mark.parametrize("keys", OTHERS.values(), ids=OTHERS)
def test_other_losses_equal_the_loops(keys):
    """Bugs: a sigmoid, a margin or raw dot products that differ between tiles or devices; a weight
    at another step than the step's own; a passage counted by the queries of one device."""
    bank = "dual" if dict(keys).get("loss__identity_mask", True) else "off"
    _check(_vectors, (2, 2, 2), bank, 4, TILES[1], CONTENTS[:1], keys)


def _covers(mesh_shape, bank_kind, slices, tile) -> bool:
    """A fixed half of the slices and tiles for each mesh and bank; any two settings meet."""
    mesh, bank = MESHES.index(mesh_shape), BANKS.index(bank_kind)
    wanted = [(0, 0), (1, 1), (0, 1), (1, 0)][(mesh + bank) % 4]
    return (SLICES.index(slices), TILES.index(tile)) == wanted and mesh > 0


def _contents(mesh_shape, bank_kind) -> tuple[bool, bool]:
    """Packing and hard negatives: two of the four for each bank, so that oracles are few."""
    mesh, bank = MESHES.index(mesh_shape), BANKS.index(bank_kind)
    return CONTENTS[[(0, 1, 3), (3, 2, 0)][mesh % 2][bank]]


@_grid(_covers)
def test_towers_equal_the_loops(mesh_shape, bank_kind, slices, tile):
    """Bugs: as on vectors, and sharded parameters gathered or reduced wrongly."""
    contents = [_contents(mesh_shape, bank_kind)]
    _check(_transformers, mesh_shape, bank_kind, slices, tile, contents)


def test_the_covers_meet_all():
    """Bug: a default run in which, say, tiles and the dual bank never meet."""
    settings = ["mesh", "bank", "slices", "tile", "packing", "hard"]
    names = [dict(zip(settings, (*c, *_contents(*c[:2])), strict=True)) for c in _GRID]
    covered = [n for n, case in zip(names, _GRID, strict=True) if _covers(*case)]
    values = {
        name: {case[name] for case in names if case["mesh"] != (1, 1, 1)} for name in names[0]
    }
    for a, b in itertools.combinations(values, 2):
        met = {(case[a], case[b]) for case in covered}
        assert met == set(itertools.product(values[a], values[b])), (a, b)
    halves = [case for case in _GRID if _halves(*case)]
    for axes in itertools.combinations(range(4), 3):
        assert len({tuple(case[i] for i in axes) for case in halves}) == math.prod(
            len((MESHES, BANKS, SLICES, TILES)[i]) for i in axes
        )


@pytest.mark.parametrize("bank_kind", ["off", "dual"])
def test_nothing_to_retrieve_is_finite(bank_kind):
    """Bug: a batch without any [Ret], or of copies of one passage, gives NaN instead of zero."""
    t, params, _ = _vectors()
    c, bank = _config(bank_kind, tile=0.002), _filled(_vectors, bank_kind)
    batch = _batch(c, t, True, True)
    loss = jax.jit(jax.value_and_grad(lambda p, b: cosup.loss(p, b, bank, STEP, t, c)[0]))
    without = batch._replace(ret_valid_BxR=np.zeros_like(batch.ret_valid_BxR))
    value, grads = loss(params, without)
    assert np.isfinite(value)
    assert (
        not np.any(grads["ctx"]["embed"]["table"])
        and np.isfinite(grads["gen"]["embed"]["table"]).all()
    )
    copies = batch._replace(passage_ids_UxPx2=np.ones_like(batch.passage_ids_UxPx2))
    copies = copies._replace(ret_positives_BxRxSx2=np.ones_like(batch.ret_positives_BxRxSx2))
    copies.ret_positives_BxRxSx2[:, :, 1:] = 0
    value, grads = loss(params, copies)  # without a bank one candidate, probability one
    assert np.isfinite(value) and np.isfinite(grads["gen"]["embed"]["table"]).all()
    assert bank is not None or not np.any(grads["ctx"]["embed"]["table"])


def test_permuting_the_batch_changes_nothing():
    """Bug: positives found by position."""
    t, params, _ = _vectors()
    c, bank = _config("dual"), _filled(_vectors, "dual")
    batch = _batch(c, t, True, True)
    rng = np.random.default_rng(0)
    gen, ctx = rng.permutation(c.batch_size), rng.permutation(c.data.ctx_rows)
    permuted = type(batch)(**{k: v[gen if "_B" in k else ctx] for k, v in batch._asdict().items()})
    grad = jax.jit(jax.value_and_grad(lambda p, b: cosup.loss(p, b, bank, STEP, t, c)[0]))
    assert_close(grad(params, permuted), grad(params, batch))
