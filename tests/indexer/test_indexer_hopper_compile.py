"""The indexer's Gluon kernels, compiled for a Hopper that is not there."""

import re
from functools import partial

import pytest
import torch

from mlakit.indexer.hopper_launch import (
    launch_indexer_logits_hopper,
    launch_indexer_logits_paged_hopper,
    launch_select_topk_hopper,
)
from mlakit.testing.offline import CompiledKernel, offline

pytestmark = pytest.mark.compiled
F8 = torch.float8_e4m3fn


def paged_kernel(q_len: int, heads: int, page_size: int = 64) -> CompiledKernel:
    with offline(90) as compiled:
        launch_indexer_logits_paged_hopper(
            torch.empty(4, q_len, heads, 128, dtype=F8),
            torch.empty(100, page_size, 132, dtype=torch.uint8),
            torch.empty(4, q_len, heads),
            torch.empty(4, 50, dtype=torch.int32),
            torch.empty(4, dtype=torch.int32),
            torch.empty(4 * q_len, 3200),
        )
    (kernel,) = compiled
    return kernel


def rows_kernel(heads: int, s_kv: int, limited: bool) -> CompiledKernel:
    limit = torch.empty(300, dtype=torch.int32) if limited else None
    with offline(90) as compiled:
        launch_indexer_logits_hopper(
            torch.empty(300, heads, 128, dtype=F8),
            torch.empty(s_kv, 128, dtype=F8),
            torch.empty(s_kv),
            torch.empty(300, heads),
            limit,
            limit,
            torch.empty(300, s_kv),
        )
    (kernel,) = compiled
    return kernel


# DeepSeek's heads, of a speculative step and of a plain one, half and twice as many; a page that is no power of two;
# rows of any alignment, with limits and without.
@pytest.mark.parametrize(
    "compiled",
    [
        partial(paged_kernel, 2, 64), partial(paged_kernel, 1, 64), partial(paged_kernel, 2, 64, 192),
        partial(paged_kernel, 4, 32), partial(paged_kernel, 1, 128), partial(rows_kernel, 64, 4096, True),
        partial(rows_kernel, 64, 4096, False), partial(rows_kernel, 64, 4095, True),
        partial(rows_kernel, 32, 4095, True), partial(rows_kernel, 128, 4096, True),
    ],
)  # fmt: skip
def test_four_programs_of_logits_share_a_multiprocessor(compiled):
    """Nothing spills; a tile's four products are started together and waited for together, and no score takes part in
    a maximum, which is half as fast as an addition.
    """
    kernel = compiled()
    assert kernel.spills == 0
    assert kernel.registers * 128 * 4 <= 65536
    assert (kernel.shared_bytes + 1024) * 4 <= 228 * 1024
    names = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)[ .;]", kernel.sass, re.MULTILINE)
    assert names.count("QGMMA") == 4
    assert names.count("FMNMX") == 0
    assert kernel.sass.count("WARPGROUP.ARRIVE") == kernel.sass.count("WARPGROUP.DEPBAR") == 1


# Enough queries and keys for programs of four warpgroups; heads of DeepSeek and twice as many, rows of any alignment.
@pytest.mark.parametrize(
    ("heads", "s_kv", "limited"), [(64, 120_000, False), (64, 119_999, True), (128, 120_000, True)]
)
def test_four_warpgroups_of_logits_are_a_program(heads, s_kv, limited):
    """Nothing spills, and no warpgroup's product waits for its own sums."""
    kernel = rows_kernel(heads, s_kv, limited)
    assert kernel.spills == 0
    assert kernel.registers == 128
    assert kernel.shared_bytes + 1024 <= 228 * 1024
    assert kernel.sass.count("QGMMA.") == 16
    assert kernel.sass.count("WARPGROUP.ARRIVE") == kernel.sass.count("WARPGROUP.DEPBAR") == 4


# A held row of DeepSeek's k, candidates of many rows and of few. Three programs of 16 warps have 40 registers a thread,
# which costs a spill of two in the loop over a row, of 170 instructions, and was faster than without.
@pytest.mark.parametrize(
    ("rows", "columns", "resident", "spills"), [(4096, 8192, 2, 0), (4096, 32768, 3, 4), (64, 131072, 1, 0)]
)
def test_selections_fit_the_registers(rows, columns, resident, spills):
    with offline(90) as compiled:
        launch_select_topk_hopper(torch.empty(rows, columns), 2048, None, torch.empty(rows, 2048, dtype=torch.int32))
    (kernel,) = compiled
    assert kernel.spills <= spills
    threads = 1024 if rows == 64 else 512
    assert kernel.registers * threads * resident <= 65536
    assert "ATOMS.POPC.INC" in kernel.sass  # what counts without a conflict
