import math

import pytest
import torch

from mlakit.indexer import indexer_logits_paged, select_topk
from mlakit.indexer.hopper_config import (
    hopper_logits_config,
    hopper_rows_config,
    hopper_topk_config,
    why_not_aligned,
    why_not_paged,
    why_not_rows,
    why_not_topk,
)

F8 = torch.float8_e4m3fn
UNITS = 132


@pytest.mark.parametrize("heads", [32, 64, 128])
@pytest.mark.parametrize(
    ("batch", "q_len", "columns"), [(64, 1, 32768), (128, 2, 8192), (1, 1, 131072), (1, 3, 1), (0, 1, 64)]
)
def test_a_program_of_logits_takes_whole_tiles(batch, q_len, columns, heads):
    config = hopper_logits_config(batch, q_len, heads, columns, UNITS)
    assert config.split % 64 == 0
    assert config.split > 0
    assert config.queries & (config.queries - 1) == 0
    assert config.queries * heads <= 128
    assert config.queries <= q_len
    assert config.stages & (config.stages - 1) == 0
    # What a program holds in shared memory, four times.
    assert 4 * (2 * config.queries * heads + config.stages * 64) * 128 < 220 * 1024


# Where programs of four warpgroups begin, for the heads that they are for.
@pytest.mark.parametrize(
    ("s_q", "heads", "s_kv", "shared"),
    [
        (4096, 64, 8192, True), (4096, 64, 8191, False), (1, 64, 2**25, False), (2, 64, 2**25, True),
        (1, 128, 2**25, True), (4096, 32, 32768, False), (1, 64, 1, False), (0, 64, 40, False),
    ],
)  # fmt: skip
def test_programs_of_logits_for_keys_in_a_row(s_q, heads, s_kv, shared):
    config = hopper_rows_config(s_q, heads, s_kv, UNITS)
    assert config.shared == shared
    assert config.split % 64 == 0
    assert config.split > 0
    assert config.queries * heads <= 128


# Lengths at which another sample begins, and the longest one.
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("columns", [1, 511, 513, 8192, 8193, 32768, 65536, 65537, 131072, 163840])
@pytest.mark.parametrize("k", [1, 512, 2048])
def test_a_row_is_held_or_its_candidates_have_room(rows, columns, k):
    config = hopper_topk_config(columns, rows, UNITS)
    if not config.sample:
        assert config.threads * config.held >= columns
        return
    assert config.sample % 2048 == 0
    # What the sample asks for, three standard deviations of it, and three of a warp's part.
    share = k / columns
    expected = config.sample * share
    wanted = expected + 4.5 * math.sqrt(expected * (1 - share)) + 3
    candidates = (wanted + 3 * math.sqrt(wanted)) * columns / config.sample
    warps = config.threads // 32
    part = min(candidates, columns) / warps
    assert part + 3 * math.sqrt(part) <= 4096 / warps


def test_what_the_kernels_for_hopper_leave_to_others():
    q, cache = torch.empty(1, 4, 64, 128, dtype=F8), torch.empty(5, 64, 132, dtype=torch.uint8)
    uneven = torch.empty(5 * 8452, dtype=torch.uint8).as_strided((5, 64, 132), (8452, 132, 1))
    k = torch.empty(9, 128, dtype=F8)
    assert (
        why_not_rows(q[0], k)
        is why_not_paged(q, cache)
        is why_not_topk(163840, 2048)
        is why_not_aligned(q, cache)
        is None
    )
    assert "heads must be 32, 64 or 128, got 40" in (why_not_paged(q[:, :, :40], cache) or "")
    assert "dim must be 128, got 64" in (why_not_paged(q[..., :64], cache) or "")
    assert "heads must be 32, 64 or 128, got 16" in (why_not_rows(q[0, :, :16], k) or "")
    assert "dim must be 128, got 64" in (why_not_rows(q[0, ..., :64], k[:, :64]) or "")
    assert "contiguous queries, got strides [8192, 256, 1]" in (why_not_rows(q[0].view(4, 32, 256)[..., :128], k) or "")
    assert "a stride of 136" in (why_not_rows(q[0], torch.empty(9, 136, dtype=F8)[:, :128]) or "")
    many = k[:1].expand(2**30, 128)
    assert "fewer than 2**30 rows" in (why_not_rows(q[0], many) or "")
    assert "multiple of 64, got 48" in (why_not_paged(q, cache[:, :48]) or "")
    assert "a stride of 8452" in (why_not_paged(q, uneven) or "")
    assert "163840 columns, got 163841" in (why_not_topk(163841, 1) or "")
    assert "at most 2048, got 2049" in (why_not_topk(9, 2049) or "")
    assert "got 8 mod 16" in (why_not_aligned(q, cache.view(-1)[8:]) or "")


def test_a_device_without_them_is_named():
    q, weights = torch.zeros(4, 1, 64, 128).to(F8), torch.zeros(4, 1, 64)
    cache, table = torch.zeros(1, 64, 132, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.int32)
    lens = torch.ones(4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"indexer_logits_paged: impl='hopper' cannot run: .*\(Hopper\), got cpu"):
        indexer_logits_paged(q, cache, weights, table, lens, max_context_len=3, impl="hopper")
    with pytest.raises(RuntimeError, match="select_topk: impl='hopper' cannot run"):
        select_topk(weights[:, 0], 3, impl="hopper")
    with pytest.raises(ValueError, match="unknown impl 'cuda'; expected one of hopper, triton, reference"):
        select_topk(weights[:, 0], 3, impl="cuda")
