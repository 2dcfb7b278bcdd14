"""What a compiled program does on a device: matrix products, memory traffic and collectives of
every kernel, as often as the loops around it run it.

XLA's own cost analysis counts the body of a loop once.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from cosup_jax.costs.hlo import Array, Instruction, Module

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_FREE = {  # touches no data; no more than what ends in -done does
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "async-update"),
}
_GROUPS_BY_MESH = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}"
_SPLASH = re.compile(r"splash_\w+?_(fwd|dq|dkv)")  # JAX's name for its kernels
_MOVES = ("transpose", "copy", "broadcast")  # elements change their places


class Product(NamedTuple):
    """A matrix product, or a batch of them."""

    batch: int
    rows: int
    columns: int
    contracted: int
    dtype: str  # of the operands

    @property
    def flops(self) -> int:
        """Two for each multiplication and its addition."""
        return 2 * self.batch * self.rows * self.columns * self.contracted


class Collective(NamedTuple):
    """What one device sends to others."""

    kind: str  # one of COLLECTIVES
    devices: int  # that take part together
    bytes: float  # sent by each, if the data goes round in a ring
    overlapped: bool  # runs beside other kernels


class Kernel(NamedTuple):
    """What a device does in one go."""

    name: str
    opcode: str
    scope: str  # the part of the program that it comes from
    times: int  # how often it runs
    products: tuple[Product, ...]
    bytes: float  # read from and written to the device's memory
    result_bytes: float  # that its result takes there
    transposes: bool  # neighbours in memory are none afterwards
    collectives: tuple[Collective, ...]

    @property
    def flops(self) -> int:
        """Of its matrix products."""
        return sum(product.flops for product in self.products)


class Program(NamedTuple):
    """All kernels of one device, and the loops that run as often as data says: counted at most."""

    kernels: list[Kernel]
    bounded: list[str]

    @property
    def flops(self) -> int:
        """Of all matrix products."""
        return sum(kernel.times * kernel.flops for kernel in self.kernels)

    def collective_bytes(self) -> dict[str, float]:
        """Bytes sent, by kind."""
        total = dict.fromkeys(COLLECTIVES, 0.0)
        for kernel in self.kernels:
            for one in kernel.collectives:
                total[one.kind] += kernel.times * one.bytes
        return total

    def largest(self, count: int) -> list[Kernel]:
        """The kernels with the largest results."""
        return sorted(self.kernels, key=lambda kernel: -kernel.result_bytes)[:count]


def read(text: str) -> Program:
    """The program that `compiled.as_text()` shows."""
    module, bounded = Module(text), []
    return Program(list(_run(module, module.entry, 1, bounded)), bounded)


def _run(module: Module, computation: str, times: int, bounded: list[str]) -> Iterator[Kernel]:
    """The kernels of a computation, of its loops and of what it calls."""
    channels: set[str] = set()  # a TPU names a collective again in every fusion that it runs beside
    for one in module.computations[computation]:
        if one.opcode == "while":
            trips, exact = module.trips(one)
            bounded += [] if exact else [one.name]
            body = re.search(r"body=%([\w.\-]+)", one.attributes)[1]
            yield from _run(module, body, times * trips, bounded)
        elif one.opcode == "call":
            yield from _run(module, one.called[0], times, bounded)
        elif one.opcode == "conditional":
            branches = [list(_run(module, branch, times, bounded)) for branch in one.called]
            yield from max(branches, key=lambda branch: sum(k.flops + k.bytes for k in branch))
        elif one.opcode not in _FREE and not one.opcode.endswith("-done"):
            yield _kernel(module, one, times, channels)


def _kernel(module: Module, instruction: Instruction, times: int, channels: set[str]) -> Kernel:
    """The work of an instruction, and of all that is fused into it."""
    inside = [instruction]
    for called in instruction.called:
        inside += module.inside(called)
    scope = re.search(r'op_name="([^"]*)"', instruction.attributes)
    products = tuple(product for one in inside for product in _products(module, one))
    return Kernel(
        name=instruction.name,
        opcode=instruction.opcode,
        scope=scope[1] if scope else "",
        times=times,
        products=products,
        bytes=_traffic(module, instruction),
        result_bytes=instruction.bytes,
        # A GPU's product parts neighbours within its tiles, which lie on the core.
        transposes=not products and _transposes(module, instruction),
        collectives=tuple(_collectives(module, instruction, inside, channels)),
    )


def _products(module: Module, one: Instruction) -> list[Product]:
    """Its matrix products: a dot, a TPU's convolution, or what a GPU's library is called for."""
    calls = one.opcode == "custom-call"
    if one.opcode == "convolution":
        return [_convolution(module, one)]
    if calls and "__cudnn$fmha" in one.attributes:
        return _cudnn(module, one)
    if calls and (part := _SPLASH.match(one.name)):
        return _splash(module, one, part[1])
    if one.opcode == "dot":
        dims = lambda side: one.numbers(rf"lhs_{side}_dims={{([\d,]*)}}")
    elif calls and re.search(r"gemm|matmul", one.attributes):
        dims = lambda side: one.numbers(rf'"lhs_{side}_dimensions":\[([\d,"]*)\]')
    else:
        return []
    lhs, rhs = (operand.arrays[0] for operand in module.operands(one)[:2])
    size = lambda numbers: math.prod(lhs.sizes[d] for d in numbers)
    batch, contracted = size(dims("batch")), size(dims("contracting"))
    shared = batch * contracted
    return [Product(batch, lhs.count // shared, rhs.count // shared, contracted, lhs.dtype)]


def _cudnn(module: Module, one: Instruction) -> list[Product]:
    """Of cuDNN's attention: scores and values; backwards the scores again and four gradients."""
    B, H, T, S = one.numbers(r'"intermediate_tensor_shape":\{"dimensions":\[([\d,"]*)\]')
    q = module.operands(one)[0].arrays[0]
    seen = S // 2 if "CAUSAL" in one.attributes else S  # it leaves the later half out
    product = Product(B * H, T, seen, q.count // (B * H * T), q.dtype)
    return [product] * (5 if "Backward" in one.attributes else 2)


def _splash(module: Module, one: Instruction, part: str) -> list[Product]:
    """Of a TPU's attention, causal: scores and values; scores and the query's gradient; or scores
    and those of keys and values."""
    q, k = (operand.arrays[0] for operand in module.operands(one)[2:4])
    T, E = q.sizes[-2:]
    product = Product(q.count // (T * E), T, k.sizes[-2] // 2, E, q.dtype)
    return [product] * {"fwd": 2, "dq": 3, "dkv": 4}[part]


def _convolution(module: Module, one: Instruction) -> Product:
    """As one product, whose rows are the places where a tap of the window meets an input."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    lhs, rhs = (operand.arrays[0].sizes for operand in module.operands(one)[:2])
    (left, right, out), result = labels, one.arrays[0].sizes
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    window = dict(part.split("=") for part in window[1].split()) if window else {}
    rows = lhs[left.index("b")] // (one.numbers(r"batch_group_count=(\d+)") or [1])[0]
    for d, letter in enumerate(sorted(filter(str.isdigit, left))):
        per = lambda key, default, d=d: window[key].split("x")[d] if key in window else default
        rows *= _meetings(
            result[out.index(letter)],
            rhs[right.index(letter)],
            lhs[left.index(letter)],
            int(per("pad", "0_0").split("_")[0]),
            int(per("stride", 1)),
            int(per("lhs_dilate", 1)),
            int(per("rhs_dilate", 1)),
        )
    columns, contracted = rhs[right.index("o")], rhs[right.index("i")]
    return Product(1, rows, columns, contracted, module.operands(one)[0].arrays[0].dtype)


@functools.lru_cache(maxsize=4096)
def _meetings(outs: int, taps: int, ins: int, low: int, stride: int, dilated: int, apart: int):
    """Pairs of an output place and a tap that meet an input, not padding nor a hole."""
    at = (out * stride + tap * apart - low for tap in range(taps) for out in range(outs))
    return sum(place % dilated == 0 and 0 <= place < ins * dilated for place in at)


def _transposes(module: Module, kernel: Instruction) -> bool:
    if kernel.opcode == "fusion":
        return _apart(module, module.root(kernel.called[0]), 1, {}) > 1
    return kernel.opcode in _MOVES and kernel.arrays[0].count > 1 and _before(module, kernel, 1) > 1


def _apart(module: Module, one: Instruction, steps: int, seen: dict) -> int:
    """How far apart the elements lie in a fusion's arguments that are `steps` apart in `one`.

    The farthest, in elements: two transposes in a row may cancel.
    """
    if one.opcode == "parameter":
        return steps
    if (one.name, steps) not in seen:
        before = _before(module, one, steps)
        operands = [o for o in module.operands(one) if o.arrays[0].count > 1] if before else ()
        found = max((_apart(module, o, before, seen) for o in operands), default=0)
        seen[one.name, steps] = found
    return seen[one.name, steps]


def _before(module: Module, one: Instruction, steps: int) -> int:
    """How far apart in its operand elements lie that are `steps` apart in the result of `one`."""
    if one.opcode in ("tuple", "dot", "convolution", "reduce"):
        return 1  # a loop of its own over each operand
    if one.opcode not in _MOVES:
        return steps
    after, before = one.arrays[0], module.operands(one)[0].arrays[0]
    stride, dimension = max((s, d) for d, s in _strides(after).items() if s <= steps)
    order = one.numbers(r"dimensions=\{([\d,]*)\}")
    if one.opcode == "broadcast":  # names the result's dimensions that its operand has
        dimension = order.index(dimension) if dimension in order else None
    elif order:
        dimension = order[dimension]
    return steps // stride * _strides(before).get(dimension, 0)


def _strides(array: Array) -> dict[int, int]:
    """Elements from one to the next along each dimension that has a next."""
    found, stride = {}, 1
    for dimension in array.layout:
        if array.sizes[dimension] > 1:
            found[dimension] = stride
        stride *= array.sizes[dimension]
    return found


def _traffic(module: Module, one: Instruction) -> float:
    """Bytes of the device's memory that it reads and writes."""
    operands = module.operands(one)
    if one.opcode in ("slice-start", "copy-start"):  # (source, target, ...) or the reverse
        moved = min(array.bytes for array in one.arrays[:2])
        return moved * sum(not array.on_core for array in one.arrays[:2])
    if one.opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * one.bytes
    if one.opcode == "dynamic-update-slice":
        return 2 * operands[1].bytes
    if one.opcode not in ("fusion", "fusion-start"):
        return one.bytes + sum(operand.bytes for operand in operands)
    called = one.called[0]
    read = sum(
        min(_read(module, called, module.parameter(called, number)), operand.bytes)
        for number, operand in enumerate(operands)
    )
    return read + _written(module, one)


def _read(module: Module, computation: str, source: Instruction) -> float:
    """Bytes of `source` that a fused computation looks at: infinitely many if all of them."""
    total = 0.0
    for user in module.computations[computation]:
        for place, name in enumerate(user.operands):
            if name != source.name:
                continue
            if user.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "dynamic-update-slice" and place == 0:
                pass  # in place: what is not replaced is not touched
            elif user.opcode in ("bitcast", "reshape"):
                total += _read(module, computation, user)
            elif user.opcode == "fusion":
                total += _read(module, user.called[0], module.parameter(user.called[0], place))
            else:
                return math.inf
    return total


def _written(module: Module, fusion: Instruction) -> float:
    """Bytes that a fusion writes: of an array updated in place, those of the update."""
    root = module.root(fusion.called[0])
    results = module.operands(root) if root.opcode == "tuple" else [root]
    arrays, total = fusion.arrays, 0.0
    if fusion.opcode == "fusion-start":  # (operands, results, ...)
        arrays = arrays[sum(len(operand.arrays) for operand in module.operands(fusion)) :]
    for array, one in zip(arrays, results, strict=False):
        while one.opcode in ("bitcast", "copy", "convert"):
            (one,) = module.operands(one)
        if one.opcode == "dynamic-update-slice":
            array = _smaller(array, module.operands(one)[1].arrays[0])
        total += 0 if array.on_core else array.bytes
    return total


def _smaller(whole: Array, part: Array) -> Array:
    return whole._replace(sizes=part.sizes, dtype=part.dtype)


def _collectives(module: Module, kernel: Instruction, inside, channels) -> Iterator[Collective]:
    # A TPU writes a reduce-scatter as a fusion of all-reduce and slice.
    scatters = any(name.startswith("all-reduce-scatter") for name in kernel.called)
    overlapped = kernel.opcode.endswith("-start") or any(
        "AsyncCollective" in one.attributes for one in inside
    )
    for one in inside:
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        channel = one.numbers(r"channel_id=(\d+)")
        if channel and channel[0] in channels:
            continue
        channels.update(channel)
        devices = _devices(one, module.devices)
        arrays = one.arrays
        if one.opcode in ("all-gather-start", "collective-permute-start"):  # (operand, result, ...)
            arrays = arrays[len(one.operands) : 2 * len(one.operands)]
        result = sum(array.bytes for array in arrays)
        if scatters and kind == "all-reduce":
            kind, result = "reduce-scatter", result / devices
        yield Collective(kind, devices, _sent(kind, result, devices), overlapped)


def _sent(kind: str, result: float, devices: int) -> float:
    """Bytes that each device sends in a ring, for `result` bytes on each afterwards."""
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        return result * (devices - 1)
    once = result * (devices - 1) / devices
    return 2 * once if kind == "all-reduce" else once


def _devices(one: Instruction, all_devices: int) -> int:
    """Devices of a group."""
    if found := one.numbers(r"replica_groups=\[\d+,(\d+)\]<="):
        return found[0]
    if found := one.numbers(r"replica_groups=\{\{([\d,]*)\}"):
        return len(found)
    if found := re.search(_GROUPS_BY_MESH, one.attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    if re.search(r"replica_groups=(?!\{\})", one.attributes):
        raise ValueError(f"{one.name}: replica_groups of an unknown form: {one.attributes[:200]}")
    return all_devices
