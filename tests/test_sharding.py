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


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 4, 2)])
@pytest.mark.parametrize("widens", [True, False])
def test_gradient_of_the_mlp_is_that_of_a_plain_product(widens, sizes, devices):
    """Bugs: a gradient that is transposed, or summed over one device's rows; one that every device
    has whole."""
    mesh = sharding.make_mesh(MeshConfig(*sizes), devices)
    spec = sharding.WIDENS if widens else sharding.NARROWS
    rng = np.random.default_rng(0)
    thin, wide = (rng.normal(size=(8, 3, n)).astype(np.float32) for n in (16, 256))
    x, weight = (thin, wide) if widens else (wide, thin)
    kernel = rng.normal(size=(x.shape[2], weight.shape[2])).astype(np.float32)
    place = sharding.leaf_sharding(mesh, kernel.shape, ("embed", "mlp")[:: 1 if widens else -1])

    def loss(x, kernel):
        return jnp.sum(sharding.product(spec, x, kernel) * weight)

    with jax.set_mesh(mesh):
        given = jax.device_put(x, sharding.rows(mesh)), jax.device_put(kernel, place)
        whole = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        value, found = whole(*given)
    assert found[1].sharding.is_equivalent_to(place, 2)
    np.testing.assert_allclose(value, np.sum(x @ kernel * weight), rtol=1e-5)
    np.testing.assert_allclose(found[0], weight @ kernel.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1], np.einsum("bti,bto->io", x, weight), rtol=1e-4, atol=1e-4)


def test_gather_is_nothing_without_a_mesh():
    """Bug: a tower that runs on one device only within a mesh."""
    x = jnp.arange(6.0).reshape(2, 3)
    grad = jax.grad(lambda x: jnp.sum(sharding.gather(x, ("vocab", "embed"), (None, None)) ** 2))
    np.testing.assert_array_equal(grad(x), 2 * x)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "only one of data, fsdp and tensor may be -1"),
        ({"data": -1, "fsdp": 3}, "data=-1 x fsdp=3 x tensor=1 does not make 8 devices"),
        ({"data": 2, "fsdp": 2}, "data=2 x fsdp=2 x tensor=1 does not make 8 devices"),
    ],
)
def test_axes_that_do_not_make_the_devices_are_refused(axes, message, devices):
    """Bug: a mesh that leaves devices idle, or an error of NumPy's about shapes."""
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(MeshConfig(**axes), devices)


def test_what_an_axis_does_not_divide_stays_whole_and_is_counted(devices):
    """Bugs: an odd size that XLA pads or refuses; a leaf on every device that nobody is told of."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    place = lambda *shape: sharding.leaf_sharding(mesh, shape, ("embed", "mlp"))
    split = [tuple(place(*shape).spec) for shape in ((4, 4), (4, 3), (3, 4))]
    assert split == [("fsdp", "tensor"), ("fsdp", None), (None, "tensor")]
    whole = [sharding.whole_over(place(*shape)) for shape in ((4, 4), (4, 3), (3, 4), (3, 3))]
    assert whole == [[], ["tensor"], ["fsdp"], ["fsdp", "tensor"]]
    leaves = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((4, 4), (4, 3))]
    share = sharding.replicated_share([place(*leaf.shape) for leaf in leaves], leaves)
    assert share == {"fsdp": 0.0, "tensor": 12 / 28}


def test_rows_split_evenly_or_not_at_all(devices):
    """Bug: micro-batches that do not divide the rows; advice that is refused in its turn."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    sharding.check_rows(mesh, "batch_size", 16, 2)
    with pytest.raises(UserError, match=r"batch_size=12 is no multiple of 8 = .*; try 16$"):
        sharding.check_rows(mesh, "batch_size", 12, 2)
    assert sharding.parts_here(8) == 1
    with jax.set_mesh(mesh):
        assert (sharding.parts_here(8), sharding.parts_here(6)) == (4, 1)
