"""The sparse kernels compiled for GPUs that are not here, by the real launchers: they build, fit, and spill nothing."""

import re

import pytest
import torch

from mlakit.hardware import shared_limit
from mlakit.sparse.config import choose_config
from mlakit.sparse.triton_launch import _launch_decode, _launch_prefill
from mlakit.testing.offline import CompiledKernel, offline

pytestmark = pytest.mark.compiled

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.uint8


def compile_prefill(target: int, heads: int, rope: int, dtype: torch.dtype, rank: int = 512) -> list[CompiledKernel]:
    q = torch.empty((4, heads, rank + rope), dtype=dtype)
    numbers = torch.empty((4, heads))
    with offline(target) as kernels:
        _launch_prefill(
            q,
            torch.empty((100, 1, rank + rope), dtype=dtype),
            torch.empty((4, 1, 2048), dtype=torch.int32),
            None,
            None,
            torch.empty((4, heads, rank), dtype=dtype),
            numbers,
            numbers.clone(),
            softmax_scale=1.0,
        )
    return kernels


def compile_decode(target: int, heads: int, batch: int, cache: torch.dtype) -> list[CompiledKernel]:
    width = 656 if cache == FP8 else 576
    with offline(target) as kernels:
        _launch_decode(
            torch.empty((batch, 1, heads, 576), dtype=BF16),
            torch.empty((4, 64, width), dtype=cache),
            torch.empty((batch, 1, 2048), dtype=torch.int32),
            torch.empty(heads),
            torch.empty(batch, dtype=torch.int32),
            torch.empty((batch, 1, heads, 512), dtype=BF16),
            torch.empty((batch, 1, heads)),
            softmax_scale=1.0,
            num_splits=None,
        )
    return kernels


def check(kernel: CompiledKernel, target: int, heads: int, rope: int, fp8: bool, rank: int = 512) -> None:
    capability = (target // 10, target % 10)
    config = choose_config(group=heads, rank=rank, rope=rope, item_bytes=2, fp8=fp8, capability=capability)
    assert kernel.shared_bytes <= config.shared_bytes(rank, rope, 2, fp8) <= shared_limit(capability)
    if not config.wgmma:
        assert kernel.spills == 0
        return
    # 128 accumulators a thread leave little: what is needed before and after the loop may lie in memory, but nothing of
    # the loop itself (of the float8 form one register).
    (loop,) = key_loops(kernel.sass)
    assert spills(loop) <= (1 if fp8 else 0)
    assert kernel.spills <= 24
    # Each warpgroup has half of the keys' scores and half of the output's columns. If Triton gave both all of the
    # scores there would be twice as many products for them, and everything would still be right.
    products = [found[1] for line in loop if (found := re.search(r"HGMMA\.(\d+x\d+)x16", line))]
    assert products.count("64x32") == (rank + rope) // 16
    assert products.count(f"64x{rank // 2}") == 4
    assert len(products) == (rank + rope) // 16 + 4
    assert [line for line in loop if "LDGSTS" in line]  # keys are copied asynchronously


def spills(code: list[str]) -> int:
    return sum(bool(re.search(r"\b(?:LDL|STL)\b", line)) for line in code)


def key_loops(sass: str) -> list[list[str]]:
    """The loops that multiply matrices, in order."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(\S.*)", sass)]
    back = [(int(found[1], 16), at) for at, text in code if (found := re.search(r"BRA (0x[0-9a-f]+)", text))]
    loops = [[text for at, text in code if begin <= at <= end] for begin, end in back if begin < end]
    return [loop for loop in loops if any("MMA" in line for line in loop)]


# Both forms for Hopper, one with another rank and no rope part; a GPU without Hopper's instructions.
@pytest.mark.parametrize(
    ("target", "heads", "rope", "dtype", "rank"),
    [
        (90, 128, 64, BF16, 512),
        (90, 64, 0, FP16, 256),
        (90, 16, 64, BF16, 512),
        (80, 128, 64, BF16, 512),
    ],
)
def test_prefill(target: int, heads: int, rope: int, dtype: torch.dtype, rank: int) -> None:
    (kernel,) = compile_prefill(target, heads, rope, dtype, rank)
    check(kernel, target, heads, rope, False, rank)


# Few requests, which are cut into pieces, and as many as there are multiprocessors.
@pytest.mark.parametrize(
    ("target", "heads", "batch", "cache"),
    [
        (90, 128, 8, FP8),
        (100, 128, 148, FP8),
    ],
)
def test_decode(target: int, heads: int, batch: int, cache: torch.dtype) -> None:
    attention, *combine = compile_decode(target, heads, batch, cache)
    assert len(combine) == (batch == 8)
    check(attention, target, heads, 64, cache == FP8)
    for kernel in combine:
        assert kernel.spills == 0
