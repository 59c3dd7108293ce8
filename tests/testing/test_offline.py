"""What compiling without a GPU says of a kernel."""

import re

import pytest
import torch
import triton
import triton.language as tl

from mlakit.testing.offline import offline

pytestmark = pytest.mark.compiled


@triton.jit
def _centre_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, x - tl.sum(x) / BLOCK)  # all of it is alive while it is summed


@pytest.mark.parametrize(("block", "fits"), [(256, True), (8192, False)])
def test_spills_are_those_of_the_sass(block, fits):
    with offline(90) as compiled:
        _centre_kernel[(1,)](torch.empty(block), BLOCK=block, num_warps=1)
    (kernel,) = compiled
    assert kernel.name == "_centre_kernel"
    assert 0 < kernel.registers <= 255
    assert (kernel.spills == 0) == fits
    assert len(re.findall(r"\b(?:LDL|STL)\b", kernel.sass)) == kernel.spills
    assert "LDG" in kernel.sass
    assert "ld.global" in kernel.ptx


def test_only_known_targets():
    with pytest.raises(ValueError, match="capability must be one of 80, 90, 100, got 70"), offline(70):
        pass
