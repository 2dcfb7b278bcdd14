"""The device mesh and the one table that says which mesh axis splits which logical axis."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cosup_jax.config import MeshConfig
from cosup_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
LANES = 128  # of a TPU's vector registers
WIDENS, NARROWS = "btd,df->btf", "btf,fd->btd"

# logical axis -> mesh axes. A dimension that its axes do not divide stays whole on every device.
RULES = {
    "batch": ("data", "fsdp"),  # rows of a batch, queries, candidates
    "embed": ("fsdp",),  # residual features of a parameter
    "vocab": ("tensor",),
    "q_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "head_dim": (),
    "lora": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh (data, fsdp, tensor) over all devices, Auto axis types.

    Raises UserError if the axes do not multiply to the number of devices, or slices are miscounted.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1:
        raise UserError("config.mesh: only one of data, fsdp and tensor may be -1")
    known = 1
    for size in sizes:
        known *= max(size, 1) if size != -1 else 1
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if sizes[0] * sizes[1] * sizes[2] != len(devices):
        raise UserError(
            f"config.mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} does "
            f"not make {len(devices)} devices; set one axis to -1"
        )
    return Mesh(_grid(sizes, config.slices, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(sizes: Sequence[int], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the shape of the mesh, so that neighbours on an axis are near each other."""
    there = len({getattr(device, "slice_index", 0) for device in devices})
    of_tpu = devices[0].platform == "tpu"  # a GPU's slices are its hosts, which one mesh may span
    if there != slices and (slices > 1 or of_tpu):
        raise UserError(
            f"config.mesh.slices={slices}, but the {len(devices)} devices lie in {there} slice(s); "
            f"set it to {there}"
        )
    # An axis of the mesh may end inside one of the torus, as 64 x 2 on v5p:4x4x8 does.
    make = {"devices": list(devices), "allow_split_physical_axes": True}
    if slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes), **make)
    if sizes[0] % slices:
        raise UserError(
            f"config.mesh.data={sizes[0]} is no multiple of config.mesh.slices={slices}: only data "
            "is split over slices"
        )
    inside = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), **make)


def spec(mesh, shape: Sequence[int], logical: Sequence[str | None]) -> P:
    """PartitionSpec of an array by its logical axes; None means not split."""
    entries = []
    for size, name in zip(shape, logical, strict=True):
        axes = tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1) if name else ()
        parts = 1
        for axis in axes:
            parts *= mesh.shape[axis]
        entries.append(axes if axes and size % parts == 0 else None)
    return P(*entries)


def leaf_sharding(mesh: Mesh, shape: Sequence[int], logical: Sequence[str | None]) -> NamedSharding:
    """NamedSharding of one array by its logical axes."""
    return NamedSharding(mesh, spec(mesh, shape, logical))


def tree_shardings(mesh: Mesh, axes: Any, tree: Any) -> Any:
    """NamedShardings of a tree of arrays, by a tree of the same shape of logical-axis tuples."""
    is_axes = lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)
    place = lambda names, leaf: leaf_sharding(mesh, leaf.shape, names)
    return jax.tree.map(place, axes, tree, is_leaf=is_axes)


def rows(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over data and fsdp."""
    return NamedSharding(mesh, P(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def parts_here(rows: int) -> int:
    """Into how many parts `jax.set_mesh`'s mesh splits an axis of `rows` rows; 1 outside it."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else row_parts(mesh)
    return parts if rows % parts == 0 else 1


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Fixes the sharding of an intermediate; does nothing outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, x.shape, logical))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, parts: Sequence[str | None], whole: Sequence[str | None]) -> jax.Array:
    """`constrain(x, *whole)` of what lies as `parts` say.

    The gradient, a sum over devices, goes straight back to the parts: a reduce-scatter, where
    `constrain` would give every device the whole sum.
    """
    return constrain(x, *whole)


gather.defvjp(
    lambda x, parts, whole: (constrain(x, *whole), None),
    lambda parts, whole, _, grad: (constrain(grad, *parts),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VxD: jax.Array, ids: jax.Array, axis: str | None, dtype: str) -> jax.Array:
    """[..., D] rows in `dtype` of a table that lies as (axis, "embed") says.

    The gradient is summed in float32: in bfloat16 the row of a frequent token stops growing.
    """
    return constrain(table_VxD.astype(dtype), axis, None)[ids]  # gathered once, over fsdp


def _lookup_back(axis: str | None, dtype: str, kept, grad):
    table_VxD, ids = kept
    sum_VxD = jnp.zeros(table_VxD.shape).at[ids].add(grad.astype(jnp.float32))
    return constrain(sum_VxD, axis, "embed").astype(table_VxD.dtype), None


lookup.defvjp(
    lambda table_VxD, ids, axis, dtype: (lookup(table_VxD, ids, axis, dtype), (table_VxD, ids)),
    _lookup_back,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """jnp.einsum, with a gradient of the kernel that is made the way XLA does best."""
    return jnp.einsum(spec, x, kernel)


def _product_back(spec: str, operands, grad):
    x, kernel = operands
    (grad_x,) = jax.linear_transpose(lambda x: jnp.einsum(spec, x, kernel), x)(grad)
    mesh, F = jax.sharding.get_abstract_mesh(), kernel.shape[1 if spec == WIDENS else 0]
    scatters = not mesh.empty and mesh.shape["fsdp"] > 1 and F % (LANES * mesh.shape["tensor"]) == 0
    if scatters and spec in (WIDENS, NARROWS):
        return grad_x, _scattered(spec, x, grad)
    return grad_x, _narrow_first(spec, x, grad)


def _scattered(spec: str, x, grad) -> jax.Array:
    """An MLP's: XLA for TPU makes a reduce-scatter of a sum over devices where the shape of the
    parts suits it: of [D, F] often not, as with F = 11,008 = 2 x 43 x 128 on 64 devices; then every
    device gets the whole sum. So it is summed as [D, G, LANES], where `tensor` divides G."""
    thin_BxTxD, wide_BxTxF = (x, grad) if spec == WIDENS else (grad, x)
    wide_BxTxGxL = wide_BxTxF.reshape(*wide_BxTxF.shape[:2], -1, LANES)
    sum_DxGxL = jnp.einsum("btd,btgl->dgl", thin_BxTxD, wide_BxTxGxL)
    sum_DxF = constrain(sum_DxGxL, "embed", "mlp", None).reshape(len(sum_DxGxL), -1)
    return sum_DxF if spec == WIDENS else sum_DxF.T


def _narrow_first(spec: str, x, grad) -> jax.Array:
    """Of x * grad XLA for CPU transposes the first: here the narrower one, and where queries, keys
    and values or gate and up read one x, once for all."""
    inputs, over, outputs = spec.replace("->", ",").split(",")
    straight = functools.partial(jnp.einsum, f"{inputs},{outputs}->{over}")
    if x.size <= grad.size:
        return straight(x, grad)

    def turned(x, grad):
        found = jnp.einsum(f"{outputs},{inputs}->{outputs[2:]}{inputs[2:]}", grad, x)
        return jnp.einsum(f"{outputs[2:]}{inputs[2:]}->{over}", found)

    if x.dtype == jnp.bfloat16:  # which XLA for CPU, of jax 0.12, sums as such where it is turned
        return jax.lax.platform_dependent(x, grad, cpu=straight, default=turned)
    return turned(x, grad)


product.defvjp(lambda spec, x, kernel: (jnp.einsum(spec, x, kernel), (x, kernel)), _product_back)


def check_rows(mesh: Mesh, name: str, count: int, micro_batches: int) -> None:
    """Raises UserError unless `count` rows split evenly over devices and micro-batches."""
    parts = row_parts(mesh) * micro_batches
    if count % parts:
        raise UserError(
            f"{name}={count} is no multiple of {parts} = mesh data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} x micro_batches {micro_batches}; try "
            f"{-(-count // parts) * parts}"
        )


def whole_over(place: NamedSharding) -> list[str]:
    """Axes of several devices, meant to split parameters, that do not split this array."""
    splits = lambda axis: any(axis == entry or axis in (entry or ()) for entry in place.spec)
    return [a for a in ("fsdp", "tensor") if place.mesh.shape[a] > 1 and not splits(a)]


def replicated_share(shardings: Any, shapes: Any) -> dict[str, float]:
    """Per mesh axis of more than one device: share of bytes that the axis does not split.

    Only fsdp and tensor are meant to split parameters; data always copies them.
    """
    pairs = list(zip(jax.tree.leaves(shardings), jax.tree.leaves(shapes), strict=True))
    total = sum(leaf.size * leaf.dtype.itemsize for _, leaf in pairs)
    share = {}
    for axis in ("fsdp", "tensor"):
        if pairs and pairs[0][0].mesh.shape[axis] > 1:
            whole = sum(
                leaf.size * leaf.dtype.itemsize
                for sharding, leaf in pairs
                if not any(axis in (entry or ()) for entry in sharding.spec)
            )
            share[axis] = whole / total
    return share
