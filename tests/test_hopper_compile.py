"""The change that is made to the PTX of a warp-specialized kernel."""

import pytest

from mlakit.hopper_compile import keep_warps_together

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


# Another number, or none: code that is not recognised stays as it is.
@pytest.mark.parametrize("change", [("%r1, 5", "%r1, 7"), ("%tid.x", "%tid.y"), ("shfl.sync.idx", "shfl.sync.up")])
def test_other_code_is_left_alone(change: tuple[str, str]) -> None:
    code = BEFORE.replace(*change)
    assert keep_warps_together(code) == code
