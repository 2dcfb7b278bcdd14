"""FLOPs and collectives of compiled programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cosup_jax import sharding
from cosup_jax.config import MeshConfig
from cosup_jax.costs import kernels
from cosup_jax.costs.hlo import Module


def compiled(function, *shapes, **jit):
    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **jit).lower(*like).compile().as_text()


def test_products_in_nested_loops_count_as_often_as_they_run():
    """Bug: the body of a loop counted once, as XLA's cost analysis does; or a loop in a loop by
    the inner length alone."""

    def inner(x, _):
        return jnp.tanh(x @ x), None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, None, length=5)
        return jnp.sin(x @ x), None

    program = kernels.read(compiled(lambda x: jax.lax.scan(outer, x, None, length=3)[0], (16, 16)))
    assert program.flops == (3 * 5 + 3) * 2 * 16**3
    assert not program.bounded


def test_products_of_batches_and_of_long_and_short_sides():
    """Bug: batch dimensions squared, or the contracted one counted with rows and columns."""
    text = compiled(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), (3, 40, 24), (3, 24, 56))
    (product,) = [p for kernel in kernels.read(text).kernels for p in kernel.products]
    assert product[:4] == (3, 40, 56, 24)
    assert product.flops == 2 * 3 * 40 * 56 * 24


@pytest.mark.parametrize("axis", [0, 1])
def test_a_loop_that_ends_where_data_says_is_counted_at_most(axis):
    """Bug: a loop over supervised tiles counted once, which forgets most of the vocabulary."""

    def walk(x, n):
        def body(i, carry):
            tile = jax.lax.dynamic_slice_in_dim(x, i * 8, 8, axis)
            return carry + jnp.sum(tile @ x.T if axis == 0 else tile.T @ x)

        return jax.lax.fori_loop(0, n, body, 0.0)

    shape = (64, 32) if axis == 0 else (32, 64)
    like = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    program = kernels.read(jax.jit(walk).lower(*like).compile().as_text())
    assert len(program.bounded) == 1
    assert program.flops == 8 * 2 * 8 * 32 * 64


def test_tiles_that_such_a_loop_writes_bound_it_too():
    """Bug: a loop that fills an array by tiles counted once."""

    def fill(x, w, n):
        tile = lambda x: x[:8] @ w
        write = lambda i, x: jax.lax.dynamic_update_slice_in_dim(x, tile(x), i * 8, 0)
        return jax.lax.fori_loop(0, n, write, x)

    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (32, 32))]
    like.append(jax.ShapeDtypeStruct((), jnp.int32))
    program = kernels.read(jax.jit(fill).lower(*like).compile().as_text())
    assert program.flops == 8 * 2 * 8 * 32 * 32


LOOP = """\
HloModule toy, num_partitions=8

%body (carry: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %carry = (s32[]{:T(128)}, f32[4,4]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %two = s32[] constant(STEP)
  %next = s32[] add(%i, %two)
  %x = f32[4,4]{1,0} get-tuple-element(%carry), index=1
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[4,4]{1,0}) tuple(%next, %y)
}

%test (kept: (s32[], f32[4,4])) -> pred[] {
  %kept = (s32[], f32[4,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%kept), index=0
  %end = s32[] constant(17)
  ROOT %less = pred[] compare(COMPARED), direction=DIRECTION
}

ENTRY %main (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  %start = s32[] constant(3)
  %first = (s32[], f32[4,4]{1,0}) tuple(%start, %p)
  %loop = (s32[], f32[4,4]{1,0}) while(%first), condition=%test, body=%body
  ROOT %r = f32[4,4]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("compared", "direction", "step", "trips"),
    [
        ("%j, %end", "LT", 1, 14),
        ("%j, %end", "LE", 1, 15),
        ("%end, %j", "GT", 1, 14),
        ("%end, %j", "GE", 1, 15),
        ("%j, %end", "NE", 1, 14),
        ("%j, %end", "LT", 4, 4),
    ],
)
def test_trip_counts_that_the_compiler_did_not_note(compared, direction, step, trips):
    """Bug: a TPU's loops, which carry no trip count, counted once; or by the end alone, whatever
    the start, the step and the comparison."""
    text = LOOP.replace("COMPARED", compared).replace("DIRECTION", direction)
    module = Module(text.replace("STEP", str(step)))
    (loop,) = [one for one in module.computations["main"] if one.opcode == "while"]
    assert module.trips(loop) == (trips, True)
    assert kernels.read(text.replace("STEP", str(step))).flops == trips * 2 * 4**3


def test_counters_that_are_copied_on_their_way():
    """Bug: a start of 3 taken for 0, or a step of 4 for 1, behind a copy."""
    text = LOOP.replace("COMPARED", "%j, %end").replace("DIRECTION", "LT").replace("STEP", "4")
    text = text.replace("tuple(%start, %p)", "tuple(%began, %p)")
    text = text.replace("  %first =", "  %began = s32[] copy(%start)\n  %first =")
    text = text.replace("tuple(%next, %y)", "tuple(%after, %y)")
    text = text.replace("  %x =", "  %after = s32[] copy(%next)\n  %x =")
    assert kernels.read(text).flops == 4 * 2 * 4**3


COLLECTIVES = """\
HloModule toy, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (whole: bf16[64,16]) -> bf16[16,16] {
  %whole = bf16[64,16]{1,0} parameter(0)
  %summed = bf16[64,16]{1,0} all-reduce(%whole), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = bf16[16,16]{1,0} dynamic-slice(%summed, %zero, %zero), dynamic_slice_sizes={16,16}
}

%begin (part: f32[2,16]) -> (f32[2,16], f32[16,16]) {
  %part = f32[2,16]{1,0} parameter(0)
  %gathered = f32[16,16]{1,0} all-gather(%part), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %started = (f32[2,16]{1,0}, f32[16,16]{1,0}) custom-call(%gathered), custom_call_target="AsyncCollectiveStart"
}

%go_on (part2: f32[2,16], other: f32[16,16]) -> f32[16,16] {
  %part2 = f32[2,16]{1,0} parameter(0)
  %other = f32[16,16]{1,0} parameter(1)
  %again = f32[16,16]{1,0} all-gather(%part2), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %twice = f32[16,16]{1,0} multiply(%other, %other)
}

ENTRY %main (p: f32[2,16], q: bf16[64,16], r: f32[16,16]) -> f32[16,16] {
  %p = f32[2,16]{1,0} parameter(0)
  %q = bf16[64,16]{1,0} parameter(1)
  %r = f32[16,16]{1,0} parameter(2)
  %scattered = bf16[16,16]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (f32[2,16]{1,0}, f32[16,16]{1,0}) fusion(%p), kind=kCustom, calls=%begin
  %beside = f32[16,16]{1,0} fusion(%p, %r), kind=kLoop, calls=%go_on
  %all = f32[16,16]{1,0} all-reduce(%beside), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  %turned = f32[16,16]{1,0} all-to-all(%all), channel_id=4, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %moved = f32[16,16]{1,0} collective-permute(%turned), channel_id=5, source_target_pairs={{0,1},{1,0}}
  ROOT %small = f32[16,16]{1,0} reduce-scatter(%moved), channel_id=6, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_bytes_that_a_ring_sends():
    """Bug: an all-reduce counted once though it goes round twice, a TPU's fused reduce-scatter as
    an all-reduce, a collective that runs beside two fusions counted in both, or the wrong group."""
    program = kernels.read(COLLECTIVES)
    assert program.collective_bytes() == {
        "all-gather": 16 * 16 * 4 * 7 / 8,
        "reduce-scatter": 16 * 16 * 2 * 3 + 16 * 16 * 4 * 7,
        "all-reduce": 2 * 16 * 16 * 4 * 3 / 4,
        "all-to-all": 16 * 16 * 4 / 2,
        "collective-permute": 16 * 16 * 4,
    }
    overlapped = [one.kind for k in program.kernels for one in k.collectives if one.overlapped]
    assert overlapped == ["all-gather"]


def test_collectives_of_a_real_program(devices):
    """Bug: what a backend writes differently from the toy text; an all-gather in a scan once."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8), devices)
    place = lambda *spec: NamedSharding(mesh, P(*spec))

    def walk(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    text = compiled(
        walk,
        (3, 32, 32),
        (8, 32),
        in_shardings=(place(None, "fsdp"), place("fsdp")),
        out_shardings=place("fsdp"),
    )
    program = kernels.read(text)
    assert program.flops == 3 * 2 * 1 * 32 * 32
    assert program.collective_bytes()["all-gather"] == 3 * 32 * 32 * 4 * 7 / 8


CONVOLUTIONS = {  # as a TPU writes matrix products: result, operands, attributes, FLOPs
    "plain": ("bf16[128,64]", "bf16[128,32]", "bf16[32,64]", "dim_labels=bf_io->bf", 128 * 64 * 32),
    "batched": (  # a batch of 8 in holes of a dilated window
        "f32[8,16,4]",
        "f32[8,16,32]",
        "f32[8,32,4]",
        "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
        8 * 16 * 4 * 32,
    ),
    "grouped": (  # rows in 4 groups, each with its share of the columns
        "f32[32,64]",
        "f32[128,16]",
        "f32[16,64]",
        "dim_labels=bf_io->bf, batch_group_count=4",
        32 * 64 * 16,
    ),
    "heads": (  # [4096, 1024] x [1024, 8 heads of 16], the heads in a padded window
        "bf16[96,8,16]",
        "bf16[24,96,1]",
        "bf16[24,8,16]",
        "window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=fb0_i0o->b0f",
        96 * 8 * 16 * 24,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_matrix_products_that_a_tpu_writes_as_convolutions(name):
    """Bug: every tap of a window counted, though most of them meet padding or holes."""
    result, left, right, attributes, products = CONVOLUTIONS[name]
    text = f"""\
HloModule toy

ENTRY %main (a: f32[], b: f32[]) -> f32[] {{
  %a = {left}{{1,0}} parameter(0)
  %b = {right}{{1,0}} parameter(1)
  ROOT %c = {result}{{1,0}} convolution(%a, %b), {attributes}
}}
"""
    assert kernels.read(text).flops == 2 * products


def test_matrix_products_that_a_gpu_leaves_to_its_library():
    """Bug: no FLOPs at all on a GPU, whose products are calls of cuBLAS."""
    text = """\
HloModule toy

ENTRY %main (a: bf16[2,64,32], b: bf16[2,32,16]) -> bf16[2,64,16] {
  %a = bf16[2,64,32]{2,1,0} parameter(0)
  %b = bf16[2,32,16]{2,1,0} parameter(1)
  ROOT %c = (bf16[2,64,16]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
}
"""  # noqa: E501
    (kernel,) = kernels.read(text).kernels
    assert kernel.products == (kernels.Product(2, 64, 16, 32, "bf16"),)


CUDNN = """\
HloModule toy

ENTRY %main (q: bf16[2,64,8,16], k: bf16[2,64,4,16], bias: bf16[2,1,64,64]) -> bf16[2,8,64,16] {{
  %q = bf16[2,64,8,16]{{3,2,1,0}} parameter(0)
  %k = bf16[2,64,4,16]{{3,2,1,0}} parameter(1)
  %bias = bf16[2,1,64,64]{{3,2,1,0}} parameter(2)
  ROOT %c = (bf16[2,8,64,16]{{3,1,2,0}}, u8[256]{{0}}) custom-call(%q, %k, %k, %bias), custom_call_target="__cudnn$fmhaScaleBiasSoftmax{suffix}", backend_config={{"cudnn_fmha_backend_config":{{"bmm1_dot_dimension_numbers":{{"lhs_batch_dimensions":["0","2"]}},"intermediate_tensor_shape":{{"dimensions":["2","8","64","64"],"element_type":"BF16"}},"mask_type":"{mask}"}}}}
}}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("suffix", "mask", "products", "seen"),
    [("", "NO_MASK", 2, 64), ("", "CAUSAL", 2, 32), ("Backward", "NO_MASK", 5, 64)],
)
def test_attention_that_a_gpu_leaves_to_cudnn(suffix, mask, products, seen):
    """Bug: attention for nothing; or as if no gradient took more, or nothing were left out."""
    (kernel,) = kernels.read(CUDNN.format(suffix=suffix, mask=mask)).kernels
    assert kernel.products == (kernels.Product(2 * 8, 64, seen, 16, "bf16"),) * products


SPLASH = """\
HloModule toy

ENTRY %main (a: s8[1], q: bf16[2,3,4,256,64], k: bf16[2,3,256,64]) -> bf16[2,3,4,256,64] {{
  %a = s8[1]{{0}} parameter(0)
  %q = bf16[2,3,4,256,64]{{4,3,2,1,0}} parameter(1)
  %k = bf16[2,3,256,64]{{3,2,1,0}} parameter(2)
  ROOT %splash_mqa_{part}_segmented_residuals.1 = bf16[2,3,4,256,64]{{4,3,2,1,0}} custom-call(%a, %a, %q, %k, %k), custom_call_target="tpu_custom_call"
}}
"""  # noqa: E501


@pytest.mark.parametrize(("part", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_attention_of_a_tpu(part, products):
    """Bug: attention for nothing, as its kernel is no product; or the later half that a causal
    kernel leaves out."""
    (kernel,) = kernels.read(SPLASH.format(part=part)).kernels
    assert kernel.products == (kernels.Product(2 * 3 * 4, 256, 128, 64, "bf16"),) * products


def test_what_a_gpu_copies_beside_moves_a_layer_and_not_the_stack():
    """Bug: a layer taken out of a stack, or put into it, counted as all of the stack, and once
    more where it is collected: a predicted step of five times what it takes."""
    text = """\
HloModule toy

%out (p: f32[12,8,4], i: s32[]) -> f32[1,8,4] {
  %p = f32[12,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = f32[1,8,4]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,8,4}
}

%into (p.1: f32[12,8,4], i.1: s32[], x: f32[1,8,4]) -> f32[12,8,4] {
  %p.1 = f32[12,8,4]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %x = f32[1,8,4]{2,1,0} parameter(2)
  %z.1 = s32[] constant(0)
  ROOT %u = f32[12,8,4]{2,1,0} dynamic-update-slice(%p.1, %x, %i.1, %z.1, %z.1)
}

ENTRY %main (a: f32[12,8,4], n: s32[]) -> f32[12,8,4] {
  %a = f32[12,8,4]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %s = ((f32[12,8,4]{2,1,0}, s32[]), f32[1,8,4]{2,1,0}, u32[]) fusion-start(%a, %n), kind=kLoop, calls=%out
  %e = f32[1,8,4]{2,1,0} fusion-done(%s)
  %t = ((f32[12,8,4]{2,1,0}, s32[], f32[1,8,4]{2,1,0}), f32[12,8,4]{2,1,0}, u32[]) fusion-start(%a, %n, %e), kind=kLoop, calls=%into
  ROOT %f = f32[12,8,4]{2,1,0} fusion-done(%t)
}
"""  # noqa: E501
    taken, put = kernels.read(text).kernels
    layer, number = 8 * 4 * 4, 4
    assert taken.bytes == put.bytes == 2 * layer + number


def test_a_collective_that_a_gpu_starts_and_collects_later():
    """Bug: the operand's bytes for the result's, or one that runs beside others counted as
    waited for."""
    text = """\
HloModule toy, num_partitions=8

ENTRY %main (p: f32[2,16]) -> f32[16,16] {
  %p = f32[2,16]{1,0} parameter(0)
  %s = (f32[2,16]{1,0}, f32[16,16]{1,0}) all-gather-start(%p), replica_groups=[1,8]<=[8]
  ROOT %d = f32[16,16]{1,0} all-gather-done(%s)
}
"""
    (kernel,) = kernels.read(text).kernels
    sent = kernels.Collective("all-gather", 8, 16 * 16 * 4 * 7 / 8, overlapped=True)
    assert kernel.collectives == (sent,)


def test_of_two_branches_the_longer_counts():
    """Bug: a step that checks a condition taken for one that does nothing."""
    small, large = (lambda x: x + 1), (lambda x: x @ x)
    text = compiled(lambda x: jax.lax.cond(x[0, 0] > 0, small, large, x), (16, 16))
    assert kernels.read(text).flops == 2 * 16**3


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4),
        ("replica_groups=mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'x','y'}", 2),
        ("replica_groups={}", 8),
    ],
)
def test_devices_of_a_group(groups, devices):
    """Bug: a form of writing groups that is not known taken for all devices."""
    assert collective(groups).devices == devices


def test_groups_that_cannot_be_read_are_told():
    """Bug: the next form that XLA comes up with taken for all devices, and nothing said."""
    with pytest.raises(ValueError, match="unknown form"):
        collective("replica_groups=new(0,1)")


def collective(groups):
    text = COLLECTIVES.replace("replica_groups=mesh['a'=4,'b'=2] {'a'}", groups)
    (found,) = next(k for k in kernels.read(text).kernels if k.name == "all").collectives
    return found


def test_text_without_a_program_is_refused():
    """Bug: an empty answer of the compiler read as a program that costs nothing."""
    with pytest.raises(ValueError, match="no ENTRY"):
        kernels.read("HloModule nothing\n")
