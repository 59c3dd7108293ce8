"""The Gluon kernels compiled for Hopper with no GPU, by the real launcher: they build, fit, and spill nothing."""

import re

import pytest
import torch

from mlakit.decode.hopper_launch import _launch_hopper_decode
from mlakit.testing.offline import CompiledKernel, offline

pytestmark = pytest.mark.compiled

SHARED_LIMIT = 227 * 1024


def compile_for_hopper(
    q_len: int, heads: int, dtype: torch.dtype = torch.bfloat16, page_size: int = 64, batch: int = 4
) -> CompiledKernel:
    q = torch.empty((batch, q_len, heads, 576), dtype=dtype)
    with offline(90) as kernels:
        _launch_hopper_decode(
            q,
            torch.empty((2, page_size, 576), dtype=dtype),
            torch.empty((batch, 8192 // page_size), dtype=torch.int32),
            torch.empty(batch, dtype=torch.int32),
            torch.empty((batch, q_len, heads, 512), dtype=dtype),
            torch.empty((batch, q_len, heads)),
            softmax_scale=1.0,
            causal=True,
            num_splits=None,
        )
    (kernel,) = kernels
    return kernel


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop that multiplies matrices, the innermost first."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/ +(\S.*?);", sass)]
    back = [(int(found[1], 16), at) for at, text in code if (found := re.search(r"BRA\S* .*?(0x[0-9a-f]+)", text))]
    bodies = [[text for at, text in code if begin <= at <= end] for begin, end in back if begin < end]
    return sorted((body for body in bodies if any("HGMMA" in text for text in body)), key=len)


# 128 heads: the kernel for many, two warpgroups of 44 matrix instructions a pair of tiles, in two loops.
@pytest.mark.parametrize(
    ("q_len", "heads", "dtype", "page_size"), [(1, 128, torch.bfloat16, 64), (2, 64, torch.float16, 256)]
)
def test_many_heads(q_len: int, heads: int, dtype: torch.dtype, page_size: int) -> None:
    kernel = compile_for_hopper(q_len, heads, dtype, page_size)
    assert kernel.name == "_mla_decode_many_kernel"
    assert kernel.shared_bytes <= SHARED_LIMIT
    assert kernel.sass.count("HGMMA") == 88
    assert kernel.sass.count("WARPGROUP.ARRIVE") <= 10  # more of them would mean products that wait for one another
    # Around the keys' loop some numbers of a piece are kept in memory.
    assert kernel.spills <= 32
    for body in loops(kernel.sass)[:2]:
        assert sum("HGMMA" in text for text in body) == 44
        assert not any("STL" in text or "LDL" in text for text in body)
        assert sum("R2UR" in text for text in body) <= 16  # descriptors live in uniform registers (180 where not)
        assert sum("BAR.ARV" in text for text in body) == 2  # told, and not waited for: a maximum, and weights
        assert len(body) < 1100  # the tail's zeros are a loop (1456 where they are not)
    assert kernel.sass.count("UTMACCTL.PF") == 3  # descriptors are asked for first
    assert "USETMAXREG" not in kernel.sass  # nobody gives registers to another: all have as many as there are


# 16 and 32 query rows, one request and several, and pages of which a tile gathers four.
@pytest.mark.parametrize(("q_len", "heads", "batch", "page_size"), [(1, 16, 1, 64), (2, 16, 4, 64), (1, 16, 4, 16)])
def test_few_heads(q_len: int, heads: int, batch: int, page_size: int) -> None:
    kernel = compile_for_hopper(q_len, heads, page_size=page_size, batch=batch)
    assert kernel.name == "_mla_decode_few_kernel"
    assert kernel.shared_bytes <= SHARED_LIMIT
    assert kernel.sass.count("HGMMA") == 68
    body = loops(kernel.sass)[0]
    assert not any("STL" in text or "LDL" in text for text in body)
    assert kernel.spills <= 48  # as above
