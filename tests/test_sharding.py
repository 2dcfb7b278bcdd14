"""The device mesh: axes over slices, and gradients of what is gathered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosup_jax import sharding
from cosup_jax.config import MeshConfig
from cosup_jax.costs import kernels
from cosup_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]  # in the torus of its slice, 4 wide
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    core_on_chip: int = 0


def slices(count, each, platform="tpu"):
    """Devices of several slices, in an order that nobody should rely on."""
    order = np.random.default_rng(0).permutation(count * each)
    at = lambda i: (i % each % 4, i % each // 4, 0)
    return [Device(i, i // each, at(i), platform) for i in order.tolist()]


def test_only_data_crosses_slices():
    """Bug: fsdp or tensor over the slow network between slices: each layer's weights cross it."""
    grid = sharding._grid((4, 2, 4), 2, slices(2, 16))
    assert grid.shape == (4, 2, 4)
    of = np.vectorize(lambda device: device.slice_index)(grid)
    assert (of == np.array([0, 0, 1, 1])[:, None, None]).all()
    assert len({device.id for device in grid.flat}) == 32


@pytest.mark.parametrize(
    ("sizes", "count", "devices", "message"),
    [
        ((8, 1, 1), 1, slices(2, 4), "slices=1, but the 8 devices lie in 2 slice"),
        ((8, 1, 1), 4, slices(2, 4), "slices=4, but the 8 devices lie in 2 slice"),
        ((1, 8, 1), 2, slices(2, 4), "data=1 is no multiple of config.mesh.slices=2"),
    ],
)
def test_slices_that_do_not_match_are_refused(sizes, count, devices, message):
    """Bug: a mesh laid over two slices as if they were one, many times slower and silent."""
    with pytest.raises(UserError, match=message):
        sharding._grid(sizes, count, devices)


def test_hosts_of_gpus_need_no_slices():
    """Bug: a GPU cluster, where every host counts as a slice, refused."""
    grid = sharding._grid((1, 8, 1), 1, slices(2, 4, platform="gpu"))
    assert grid.shape == (1, 8, 1)


def test_gradient_of_a_gathered_array_comes_back_in_parts(devices):
    """Bug: every device sums the whole gradient of what it gathered, twice the bytes; or the
    gather loses the gradient, or changes a value."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8), devices)
    rows = sharding.rows(mesh)
    x_64x4 = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    y_64x4 = np.random.default_rng(1).normal(size=(64, 4)).astype(np.float32)

    def loss(x, y, gather):
        whole = sharding.gather(x, ("batch", None), (None, None)) if gather else x
        return jnp.sum(jnp.sin(jax.lax.dot(y, whole.T)) ** 2)

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=2, in_shardings=(rows, rows))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(array, rows) for array in (x_64x4, y_64x4)]
        total, found = grad(*placed, True)
        text = grad.lower(*placed, True).compile().as_text()
    expected = jax.value_and_grad(loss)(x_64x4, y_64x4, False)
    np.testing.assert_allclose(found, expected[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(total, expected[0], rtol=1e-5)
    sent = kernels.read(text).collective_bytes()
    assert sent["all-gather"] == 64 * 4 * 4 * 7 / 8
    assert found.sharding.spec == rows.spec


def test_gather_is_nothing_without_a_mesh():
    """Bug: a tower that runs on one device only within a mesh."""
    x = jnp.arange(6.0).reshape(2, 3)
    grad = jax.grad(lambda x: jnp.sum(sharding.gather(x, ("vocab", "embed"), (None, None)) ** 2))
    np.testing.assert_array_equal(grad(x), 2 * x)
