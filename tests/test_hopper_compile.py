"""The change that is made to the PTX of a warp-specialized kernel."""

import pytest

from mlakit.hopper_compile import fetch_descriptors, keep_registers, keep_warps_together

BEFORE = """
	mov.u32 	%r1, %tid.x;
	shr.u32 	%r2, %r1, 5;
	shfl.sync.idx.b32 	%r3, %r2, 0, 31, -1;
	setp.lt.u32 	%p2, %r3, 4;
	shfl.sync.idx.b32 	%r9, %r8, 0, 31, -1;
"""


def test_the_warp_s_number_is_reduced_and_no_other_shuffle_is_touched() -> None:
    after = keep_warps_together(BEFORE)
    assert "redux.sync.max.u32 %r3, %r2, -1;" in after
    assert after.count("shfl.sync.idx.b32") == 1
    assert "%r9, %r8, 0, 31, -1" in after


REGISTERS = """
	bar.sync 	1 ;
	setmaxnreg.dec.sync.aligned.u32 	240 ;
	mov.u32 	%r1, %tid.x;
	@%p1 setmaxnreg.inc.sync.aligned.u32 	256 ;
	ret;
"""


def test_registers_are_kept_and_nothing_else_is_lost() -> None:
    kept = [line for line in REGISTERS.splitlines() if "setmaxnreg" not in line]
    assert keep_registers(REGISTERS).splitlines() == kept
    assert keep_registers(BEFORE) == BEFORE


# Another number, or none: code that is not recognised stays as it is.
@pytest.mark.parametrize("change", [("%r1, 5", "%r1, 7"), ("%tid.x", "%tid.y"), ("shfl.sync.idx", "shfl.sync.up")])
def test_other_code_is_left_alone(change: tuple[str, str]) -> None:
    code = BEFORE.replace(*change)
    assert keep_warps_together(code) == code


KERNEL = """
.visible .entry kernel(
	.param .align 64 .b8 kernel_param_0[128],
	.param .u32 kernel_param_1,
	.param .align 64 .b8 kernel_param_2[128]
)
{
	.reg .b32 	%r<3>;
// %bb.0:
	mov.u32 	%r1, %tid.x;
	ret;
}
"""


def test_every_descriptor_is_asked_for_once_by_one_thread_and_before_all_else() -> None:
    after = fetch_descriptors(KERNEL)
    front, begin, rest = KERNEL.partition("// %bb.0:\n")
    assert after.startswith(front + begin)
    assert after.endswith(rest)
    added = after[len(front + begin) : -len(rest)]
    asked = [line.split() for line in added.splitlines() if "prefetch" in line]
    assert asked == [["@one", "prefetch.param.tensormap", f"[kernel_param_{i}];"] for i in (0, 2)]


# No descriptors, or no place that is known to be the begin: code stays as it is.
@pytest.mark.parametrize("change", [("[128]", "[64]"), ("%bb.0", "%bb.7")])
def test_code_without_descriptors_is_left_alone(change: tuple[str, str]) -> None:
    code = KERNEL.replace(*change)
    assert fetch_descriptors(code) == code
