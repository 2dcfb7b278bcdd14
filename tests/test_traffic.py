"""Memory traffic of kernels, and which of them part neighbours, against counts by hand."""

import functools

import jax
import pytest
from test_kernels import compiled

from cosup_jax.costs import kernels


def test_traffic_of_slices_is_that_of_the_slices():
    """Bug: a scan that reads one layer of a stack in each turn charged for the whole stack."""
    step = lambda x, w: (x * 2 + w, None)
    text = compiled(lambda x, w: jax.lax.scan(step, x, w)[0], (1024,), (64, 1024))
    program = kernels.read(text)
    moved = sum(kernel.times * kernel.bytes for kernel in program.kernels)
    assert 64 * 3 * 4096 <= moved < 64 * 8 * 4096  # the stack would be 64 * 64 * 4096


def test_data_in_the_cores_own_memory_is_no_traffic():
    """Bug: what a TPU keeps in VMEM counted as read from HBM, which makes all memory bound."""
    text = """\
HloModule toy

ENTRY %main (a: f32[64,32]) -> f32[64,32] {
  %a = f32[64,32]{1,0} parameter(0)
  %b = f32[64,32]{1,0:T(8,128)S(1)} negate(%a)
  ROOT %c = f32[64,32]{1,0:T(8,128)} negate(%b)
}
"""
    assert [kernel.bytes for kernel in kernels.read(text).kernels] == [8192, 8192]


TRAFFIC = """\
HloModule toy

%fused (x: f32[64,32], y: f32[8,32], j: s32[]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %y = f32[8,32]{1,0} parameter(1)
  %j = s32[] parameter(2)
  INSIDE
}

ENTRY %main (a: f32[64,32], u: f32[8,32], i: s32[]) -> f32[64,32] {
  %a = f32[64,32]{1,0} parameter(0)
  %u = f32[8,32]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %kernel = LINE
}
"""
FUSION = "f32[64,32]{1,0} fusion(%a, %u, %i), kind=kLoop, calls=%fused"
PLACED = "f32[64,32]{1,0} dynamic-update-slice(%x, %y, %j, %j)"


@pytest.mark.parametrize(
    ("line", "inside", "expected"),
    [
        ("f32[64,32]{1,0} dynamic-update-slice(%a, %u, %i, %i)", "", 2 * 1024),
        ("f32[8,32]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={8,32}", "", 2 * 1024),
        ("f32[64,32]{1,0} negate(%a)", "", 2 * 8192),
        ("(f32[64,32]{1,0:S(1)}, f32[64,32]{1,0}, u32[]) copy-start(%a)", "", 8192),
        ("(f32[64,32]{1,0}, f32[64,32]{1,0}, u32[]) copy-start(%a)", "", 2 * 8192),
        (FUSION, f"ROOT %r = {PLACED}", 2 * 1024 + 4),
        (FUSION, f"%p = {PLACED}\n  ROOT %r = f32[64,32]{{1,0}} copy(%p)", 2 * 1024 + 4),
        (FUSION, f"%p = {PLACED}\n  ROOT %r = f32[64,32]{{1,0}} convert(%p)", 2 * 1024 + 4),
        (
            FUSION.replace("64,32", "4,64"),
            "%b = f32[32,64]{1,0} bitcast(%x)\n  "
            "ROOT %r = f32[4,64]{1,0} dynamic-slice(%b, %j, %j), dynamic_slice_sizes={4,64}",
            2 * 1024 + 4,
        ),
    ],
)
def test_traffic_by_hand(line, inside, expected):
    """Bug: an update in place, or a slice behind a bitcast, charged for the whole array; a prefetch
    into the core for both ways."""
    inside = inside or "ROOT %r = f32[64,32]{1,0} negate(%x)"
    (kernel,) = kernels.read(TRAFFIC.replace("LINE", line).replace("INSIDE", inside)).kernels
    assert kernel.bytes == expected


@pytest.mark.parametrize(("turn", "expected"), [(True, True), (False, False)])
def test_what_parts_neighbours(turn, expected):
    """Bug: transposes, a tenth as fast on a CPU, priced as copies; or every copy as a transpose."""
    function = (lambda x: x.T + 1) if turn else (lambda x: x.reshape(6, 2, 8) + 1)
    program = kernels.read(compiled(functools.partial(function), (12, 8)))
    assert any(kernel.transposes for kernel in program.kernels) is expected


FUSED = """\
HloModule toy

%fused (x: f32[6,4]) -> f32[1] {
  %x = f32[6,4]{1,0} parameter(0)
  LINES
}

ENTRY %main (p: f32[6,4]) -> f32[1] {
  %p = f32[6,4]{1,0} parameter(0)
  ROOT %kernel = f32[1]{0} fusion(%p), kind=kLoop, calls=%fused
}
"""
TURNED = "%t = f32[4,6]{1,0} transpose(%x), dimensions={1,0}\n  "


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (TURNED + "ROOT %r = f32[4,6]{1,0} negate(%t)", True),
        (TURNED + "ROOT %r = f32[4,6]{0,1} copy(%t)", False),  # as it lay
        (TURNED + "%b = f32[24]{0} bitcast(%t)\n  ROOT %r = f32[24]{0} negate(%b)", True),
        (TURNED + "ROOT %r = f32[4,6]{1,0} add(%t, %t)", True),
        (TURNED + "ROOT %r = (f32[4,6]{1,0}) tuple(%t)", True),
        (TURNED + "ROOT %r = f32[4]{0} reduce(%t, %t), dimensions={1}", True),
        ("ROOT %r = f32[6,4]{0,1} copy(%x)", True),
        ("ROOT %r = f32[6,4]{1,0} copy(%x)", False),
        ("ROOT %r = f32[6,4,1]{2,1,0} transpose(%x), dimensions={0,1}", False),
        ("ROOT %r = f32[3,6,4]{2,1,0} broadcast(%x), dimensions={1,2}", False),
        ("ROOT %r = f32[6,4,3]{2,1,0} broadcast(%x), dimensions={0,1}", False),  # one element
        ("ROOT %r = f32[4,6]{1,0} broadcast(%x), dimensions={1,0}", True),
        (
            "%k = f32[6,4]{1,0} copy(%x)\n  %b = f32[6,2,2]{2,1,0} bitcast(%k)\n  "
            "ROOT %r = f32[6,2,2]{1,2,0} copy(%b)",
            True,  # every other one of a row
        ),
        (
            "%b = f32[2,3,4]{2,1,0} bitcast(%x)\n  "
            "ROOT %r = f32[3,2,4]{2,1,0} transpose(%b), dimensions={1,0,2}",
            False,  # whole rows change places
        ),
        (
            "%b = f32[6,2,2]{2,1,0} bitcast(%x)\n  "
            "%c = f32[6,2,2]{1,2,0} copy(%b)\n  %d = f32[6,4]{1,0} bitcast(%c)\n  "
            "ROOT %r = f32[4,6]{1,0} transpose(%d), dimensions={1,0}",
            True,
        ),
    ],
)
def test_neighbours_are_followed_through_a_fusion(lines, expected):
    """Bug: two transposes that undo each other priced as one; or a bitcast, an operand of several
    or a tuple that hides one; or rows that move as a whole taken for it."""
    (kernel,) = kernels.read(FUSED.replace("LINES", lines)).kernels
    assert kernel.transposes is expected
