"""The Gluon kernels for float8 caches compiled for Hopper with no GPU, by the real launcher."""

import re

import pytest
import torch

from mlakit.decode.hopper_launch import _launch_hopper_decode
from mlakit.testing.offline import CompiledKernel, offline
from tests.decode.test_decode_hopper_compile import SHARED_LIMIT, loops

pytestmark = pytest.mark.compiled

E4M3 = torch.float8_e4m3fn


def compile_fp8(q_len: int, heads: int, page_size: int = 64, batch: int = 4, *, packed: bool = False) -> CompiledKernel:
    q_dtype, dtype, width = (torch.bfloat16, torch.uint8, 656) if packed else (E4M3, E4M3, 576)
    with offline(90) as kernels:
        _launch_hopper_decode(
            torch.empty((batch, q_len, heads, 576), dtype=q_dtype),
            torch.empty((2, page_size, width), dtype=dtype),
            torch.empty((batch, 8192 // page_size), dtype=torch.int32),
            torch.empty(batch, dtype=torch.int32),
            torch.empty((batch, q_len, heads, 512), dtype=torch.bfloat16),
            torch.empty((batch, q_len, heads)),
            softmax_scale=1.0,
            causal=True,
            num_splits=None,
        )
    (kernel,) = kernels
    return kernel


def check_loop(body: list[str]) -> None:
    """Scores straight from e4m3, values transposed on their way to registers, and nothing kept in memory."""
    assert sum("QGMMA" in text for text in body) == 18
    assert sum("HGMMA" in text for text in body) == 32
    assert sum(bool(re.search(r"LDSM\S*\.MT", text)) for text in body) == 16
    assert not any("STL" in text or "LDL" in text for text in body)


# One tile of 16 rows for one request, and of four pages.
@pytest.mark.parametrize(("q_len", "heads", "batch", "page_size"), [(1, 16, 1, 64), (2, 8, 4, 16)])
def test_few_heads(q_len: int, heads: int, batch: int, page_size: int) -> None:
    kernel = compile_fp8(q_len, heads, page_size, batch)
    assert kernel.name == "_mla_decode_e4m3_few_kernel"
    assert 2 * (kernel.shared_bytes + 1024) <= SHARED_LIMIT + 1024  # two programs a multiprocessor
    check_loop(loops(kernel.sass)[0])


# 64 rows, half of the columns of the output in each of two warpgroups.
def test_many_heads() -> None:
    kernel = compile_fp8(q_len=2, heads=64)
    assert kernel.name == "_mla_decode_e4m3_many_kernel"
    assert kernel.shared_bytes <= SHARED_LIMIT
    for body in loops(kernel.sass)[:2]:
        check_loop(body)
        # More of them would mean products that wait for one another.
        assert sum("WARPGROUP.ARRIVE" in text for text in body) <= 24


# 16 query rows for several requests and for one, of one page a tile and of four.
@pytest.mark.parametrize(("q_len", "heads", "batch", "page_size"), [(1, 16, 4, 64), (2, 8, 1, 16)])
def test_rows_with_scales_of_their_own(q_len: int, heads: int, batch: int, page_size: int) -> None:
    kernel = compile_fp8(q_len, heads, page_size, batch, packed=True)
    assert kernel.name == "_mla_decode_rows_kernel"
    assert 2 * (kernel.shared_bytes + 1024) <= SHARED_LIMIT + 1024
    body = loops(kernel.sass)[0]
    assert sum("HGMMA" in text for text in body) == 68  # 64 of codes from registers, 4 of rope parts
    assert sum("LDSM" in text for text in body) == 32
    assert sum("WARPGROUP.ARRIVE" in text for text in body) <= 25  # more of them: products that wait for one another
    assert not any("STL" in text or "LDL" in text for text in body)
    assert kernel.spills <= 64  # around the loop
