"""The decode kernels compiled for GPUs that are not here, by the real launcher: they build, fit, and spill nothing."""

import pytest
import torch

from mlakit.decode.triton_launch import _launch_decode
from mlakit.hardware import shared_limit
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
# page of DeepSeek's kernels, and 16 and 1, where a tile gathers several pages.
@pytest.mark.parametrize(
    ("target", "batch", "q_len", "heads", "dtype", "page_size"),
    [
        (90, 1, 1, 16, torch.bfloat16, 64),
        (90, 300, 1, 16, torch.bfloat16, 64),
        (90, 300, 1, 32, torch.bfloat16, 64),
        (90, 3, 1, 32, torch.float16, 1),
        (90, 3, 2, 16, torch.bfloat16, 64),
        (90, 1, 1, 128, torch.bfloat16, 64),
        (90, 300, 1, 128, torch.float16, 16),
        (90, 4, 2, 64, torch.bfloat16, 64),
        (90, 2, 1, 128, torch.bfloat16, 1),
        (80, 300, 1, 16, torch.bfloat16, 64),
        (80, 4, 2, 64, torch.bfloat16, 64),
        (100, 300, 1, 16, torch.bfloat16, 64),
        (100, 300, 1, 32, torch.bfloat16, 64),
        (100, 4, 2, 64, torch.bfloat16, 64),
    ],
)
def test_defaults_do_not_spill(
    target: int, batch: int, q_len: int, heads: int, dtype: torch.dtype, page_size: int
) -> None:
    kernels = compile_for(target, batch, q_len, heads, dtype, page_size)
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.spills == 0, kernel.name
        assert kernel.shared_bytes <= shared_limit((target // 10, 0))
    if target == 90 and q_len * heads >= 64:
        assert "HGMMA" in kernels[0].sass  # Hopper's own instructions
        assert "LDGSTS" in kernels[0].sass  # keys are copied asynchronously


def test_the_tiny_preset_compiles() -> None:
    for kernel in compile_for(90, 2, 1, 4, torch.float16, 16, rank=64, rope=16):
        assert kernel.spills == 0, kernel.name
