"""The decode kernels compiled for GPUs that are not here, by the real launcher: they build, fit, and spill nothing."""

import re

import pytest
import torch

from mlakit.decode.triton_launch import _launch_decode, shared_limit
from mlakit.testing.offline import CompiledKernel, offline

pytestmark = pytest.mark.compiled


def compile_for(
    target: int,
    batch: int,
    q_len: int,
    heads: int,
    dtype: torch.dtype,
    page_size: int,
    rank: int = 512,
    rope: int = 64,
) -> list[CompiledKernel]:
    q = torch.empty((batch, q_len, heads, rank + rope), dtype=dtype)
    cache = torch.empty((2, page_size, rank + rope), dtype=dtype)
    with offline(target) as kernels:
        _launch_decode(
            q,
            cache,
            torch.empty((batch, 8192 // page_size), dtype=torch.int32),
            torch.empty(batch, dtype=torch.int32),
            torch.empty((batch, q_len, heads, rank), dtype=dtype),
            torch.empty((batch, q_len, heads)),
            softmax_scale=1.0,
            causal=True,
            kv_lora_rank=rank,
            num_splits=None,
        )
    return kernels


# Few, 32 and many heads; one request and more than there are multiprocessors; several new tokens; both dtypes; the
# page of DeepSeek's kernels, and 16, where a tile gathers several pages.
@pytest.mark.parametrize(
    ("target", "batch", "q_len", "heads", "dtype", "page_size"),
    [
        (90, 1, 1, 16, torch.bfloat16, 64),
        (90, 300, 1, 32, torch.bfloat16, 64),
        (90, 1, 1, 128, torch.bfloat16, 64),
        (90, 300, 1, 128, torch.float16, 16),
        (90, 4, 2, 64, torch.bfloat16, 64),
        (80, 300, 1, 16, torch.bfloat16, 64),
        (80, 4, 2, 64, torch.bfloat16, 64),
        (100, 300, 1, 16, torch.bfloat16, 64),
        (100, 4, 2, 64, torch.bfloat16, 64),
    ],
)
def test_defaults_do_not_spill(
    target: int, batch: int, q_len: int, heads: int, dtype: torch.dtype, page_size: int
) -> None:
    kernels = compile_for(target, batch, q_len, heads, dtype, page_size)
    assert len(kernels) == 2
    for kernel in kernels:
        if target == 90 and q_len * heads >= 64 and kernel is kernels[0]:
            # 128 accumulators a thread: what ptxas prepares in front of all requests it may keep in memory between
            # two of them, but nothing in the loop over keys.
            assert kernel.spills <= 32, kernel.name
            assert spills_of_the_key_loop(kernel.sass) == 0
            assert "HGMMA" in kernel.sass  # Hopper's own instructions
            assert "LDGSTS" in kernel.sass  # keys are copied asynchronously
        else:
            assert kernel.spills == 0, kernel.name
        assert kernel.shared_bytes <= shared_limit((target // 10, 0))


def spills_of_the_key_loop(sass: str) -> int:
    """Local loads and stores in the innermost loop that multiplies matrices."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(\S.*)", sass)]
    last_product = max(at for at, text in code if "MMA" in text)
    back = [(int(found[1], 16), at) for at, text in code if (found := re.search(r"BRA (0x[0-9a-f]+)", text))]
    begin, end = min((b for b in back if b[0] < last_product < b[1]), key=lambda b: b[1] - b[0])
    return sum(begin <= at <= end for at, text in code if re.search(r"\b(?:LDL|STL)\b", text))


def test_the_tiny_preset_compiles() -> None:
    for kernel in compile_for(90, 2, 1, 4, torch.float16, 16, rank=64, rope=16):
        assert kernel.spills == 0, kernel.name
