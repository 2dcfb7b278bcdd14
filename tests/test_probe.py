"""The costly metrics against plain computations of the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import config, lookups, random_batch, towers

from cosup_jax import cosup, sharding
from cosup_jax import step as step_lib
from cosup_jax.config import MeshConfig
from cosup_jax.data.batch import batch_shape
from cosup_jax.probe import Probe

KEYS = {"bank__kind": "dual", "bank__size": 96, "bank__queries": 240, "log__probe_bank": True}
KEYS |= {"loss__nsp_weight": 0.5, "loss__ntp_weight": 2.0, "bank__start_step": 3}


@pytest.fixture(
    scope="module",
    params=[(lookups, 5.0), pytest.param((towers, 0.05), marks=pytest.mark.slow)],
    ids=["lookup", "transformer"],
)
def trained(request):
    """The states of four steps on 2 x 2 x 2, what they ran on, and their probe."""
    make, learning_rate = request.param
    c, t = config(**KEYS), make()
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    rows = sharding.rows(mesh)
    batch_at = lambda step: jax.device_put(random_batch(step % 4, batch_shape(c)), rows)
    tx = optax.sgd(learning_rate)

    def fresh():
        params = step_lib.init_params(jax.random.key(0), t, c)
        return step_lib.init_state(params, jax.random.key(1), tx, c)

    places = step_lib.state_shardings(jax.eval_shape(fresh), mesh, t, c)
    state = jax.jit(fresh, out_shardings=places)()
    step = step_lib.compile_step(mesh, places, towers=t, tx=tx, config=c)
    states = [jax.tree.map(jnp.copy, state)]
    for k in range(4):
        state, _ = jax.block_until_ready(step(state, batch_at(k)))
        states.append(jax.tree.map(jnp.copy, state))
    return c, t, states, batch_at, Probe(mesh, t, c, 0, batch_at)


def _cosine(a, b) -> float:
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_gradients_of_each_loss(trained):
    """Bugs: one loss's gradient taken for the other's, a ratio without the weights, a state that
    the probe consumes."""
    c, t, states, _, probe = trained
    params, bank = jax.device_get((states[4].params, states[4].bank))
    batch = random_batch(0, batch_shape(c))  # step 4's, and step 0's
    found = probe(states[4], 4)
    both = lambda p: (lambda found: (found.ntp, found.nsp))(cosup.terms(p, batch, bank, 4, t, c))
    one = lambda which: (jnp.float32(which == "ntp"), jnp.float32(which == "nsp"))
    alone = jax.jit(lambda p, weights: jax.vjp(both, p)[1](weights)[0])
    ntp, nsp = alone(params, one("ntp")), alone(params, one("nsp"))
    expected = {
        "grad/norm_ntp_gen": optax.tree.norm(ntp["gen"]),
        "grad/norm_nsp_gen": optax.tree.norm(nsp["gen"]),
        "grad/norm_nsp_ctx": optax.tree.norm(nsp["ctx"]),
        "grad/cosine_ntp_nsp_gen": _cosine(ntp["gen"], nsp["gen"]),
        "grad/nsp_over_ntp_gen": 0.25 * optax.tree.norm(nsp["gen"]) / optax.tree.norm(ntp["gen"]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)
    assert found.keys() - expected.keys() == {name for name in found if name.startswith("bank/")}


def test_drift_is_what_training_changed(trained):
    """Bug: a stored vector compared with another passage's, or with what was stored."""
    c, t, states, batch_at, probe = trained
    found = probe(states[4], 4)
    assert found["bank/drift_age"] == 3  # three slots: steps 1, 2 and 3 are there
    before, after = (
        np.asarray(
            jax.jit(lambda p: cosup.condense(p, batch_at(1), 1, t, c))(
                state.params["ctx"]
            ).vector_KxCxD[0]
        )
        for state in (states[1], states[4])
    )
    written_at = np.asarray(states[4].bank.passages.step_KxC)
    written = written_at[1] == 1  # and not stored again since
    cosines = np.sum(before * after, axis=1)[written]
    np.testing.assert_allclose(found["bank/drift_cosine"], cosines.mean(), rtol=1e-4)
    assert 0 < found["bank/drift_cosine"] < 0.9999
    written = written_at[written_at >= 0]
    np.testing.assert_allclose(found["bank/mean_age"], np.mean(4 - written), rtol=1e-5)
    assert found["bank/passages"] == len(written)
    assert not [name for name in probe(states[0], 0) if name.startswith("bank/")]


def test_a_fresh_dual_bank_points_where_a_large_batch_does(trained):
    """Bug: directions compared with the stale bank, or with queries that were not encoded anew;
    kinds mixed up."""
    *_, states, batch_at, probe = trained
    state = states[4]
    stale = jax.device_get(probe(state, 4))
    bank = jax.tree.map(jnp.copy, state.bank)  # what is refreshed is consumed
    for before in range(4):  # of step 0 the queries alone are left, asking for live passages
        bank = probe._refresh(bank, state.params, batch_at(before), before)
    fresh = jax.device_get(probe(state.replace(bank=bank), 4))
    for side in ("queries", "passages"):
        assert fresh[f"bank/direction_{side}_dual"] == pytest.approx(1, abs=1e-5)
        assert 0 < stale[f"bank/direction_{side}_dual"] < 0.9999
        assert fresh[f"bank/direction_{side}_off"] == pytest.approx(
            stale[f"bank/direction_{side}_off"], abs=1e-4
        )
    assert fresh["bank/direction_queries_passage"] == pytest.approx(1, abs=1e-5)
    assert fresh["bank/direction_passages_passage"] < 0.99
    assert fresh["bank/drift_cosine"] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_before_its_start_a_bank_has_no_direction(trained):
    """Bug: directions of 1 from a bank that nothing is scored against."""
    *_, states, _, probe = trained
    found = probe(states[2], 2)
    assert not [name for name in found if name.startswith("bank/direction")]
    assert found["bank/passages"] == 0 and 0 < found["bank/drift_cosine"] < 1


def test_a_skipped_step_is_not_probed(trained):
    """Bug: drift of a step that stored nothing, which is no number."""
    *_, states, _, probe = trained
    ring = states[4].bank.passages
    ring = ring._replace(step_KxC=jnp.where(ring.step_KxC == 1, -1, ring.step_KxC))
    found = probe(states[4].replace(bank=states[4].bank._replace(passages=ring)), 4)
    assert found["bank/drift_age"] == 2 and np.isfinite(found["bank/drift_cosine"])
