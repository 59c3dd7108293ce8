import pytest
import torch

from mlakit.indexer import indexer_logits, indexer_logits_paged, ops, pack_index_cache, select_topk, slots_of
from mlakit.indexer.config import LogitsConfig, TopkConfig
from mlakit.indexer.reference import (
    indexer_logits_paged_reference,
    indexer_logits_reference,
    select_topk_reference,
)
from mlakit.indexer.triton_logits import launch_indexer_logits
from mlakit.indexer.triton_slots import launch_slots_of
from mlakit.indexer.triton_topk import launch_select_topk
from mlakit.testing import poison_, random_page_table

pytestmark = pytest.mark.interpret
F8 = torch.float8_e4m3fn
Limits = tuple[torch.Tensor | None, torch.Tensor | None]


def _in(dtype, reference, *arguments):
    return reference(*arguments, dtype=dtype)


def _same(out, reference):
    assert torch.equal(torch.isneginf(out), torch.isneginf(reference))
    seen = ~torch.isneginf(reference)
    torch.testing.assert_close(out.double()[seen], reference[seen], rtol=1e-5, atol=1e-4)


def _inputs(
    s_q: int, s_kv: int, heads: int, dim: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(s_q, heads, dim, generator=generator).to(F8)
    k = torch.randn(s_kv, dim, generator=generator).to(F8)
    scales = torch.rand(s_kv, generator=generator) + 0.5
    return q, k, scales, torch.randn(s_q, heads, generator=generator)


# One query and key; heads that are no power of two and more queries than a tile, keys that no tile fills; DeepSeek's
# own heads and width.
@pytest.mark.parametrize(("s_q", "s_kv", "heads", "dim"), [(1, 1, 1, 32), (3, 70, 5, 64), (2, 33, 64, 128)])
@pytest.mark.parametrize("limited", [False, True])
def test_logits(s_q, s_kv, heads, dim, limited):
    q, k, scales, weights = _inputs(s_q, s_kv, heads, dim)
    limits: Limits = (None, None)
    if limited:
        end = (torch.arange(s_q) * 20 + 1).int().clamp(max=s_kv)
        limits = ((end - 25).int(), end)
    out = indexer_logits(q, k, scales, weights, *limits, impl="triton")
    _same(out, _in(torch.float64, indexer_logits_reference, q, k, scales, weights, *limits))


# Limits before, behind, around and outside of the keys, in one tile of queries and in several; parts of keys that a
# program has alone; keys that are read must be live, so the others are NaN.
def test_limits_of_all_kinds_and_parts():
    q, k, scales, weights = _inputs(7, 150, 3, 32)
    start = torch.tensor([0, 40, 149, 10, 90, -5, 200], dtype=torch.int32)
    end = torch.tensor([1, 100, 150, 10, 20, 33, 300], dtype=torch.int32)
    out = poison_(torch.empty(7, 150))
    launch_indexer_logits(q, k, scales, weights, start, end, out, LogitsConfig(2, 16, 4, 2, split=64))
    _same(out, _in(torch.float64, indexer_logits_reference, q, k, scales, weights, start, end))
    only_end = indexer_logits(q, k, scales, weights, None, end, impl="triton")
    _same(only_end, _in(torch.float64, indexer_logits_reference, q, k, scales, weights, None, end))


def test_keys_outside_the_limits_are_not_read():
    q, k, scales, weights = _inputs(2, 128, 2, 32)
    k.view(torch.uint8)[64:] = 0x7F
    scales[64:] = torch.nan
    limits = (torch.zeros(2, dtype=torch.int32), torch.tensor([3, 60], dtype=torch.int32))
    out = poison_(torch.empty(2, 128))
    launch_indexer_logits(q, k, scales, weights, *limits, out, LogitsConfig(2, 64, 4, 2))
    assert not out.isnan().any()
    k.view(torch.uint8)[1, 0] = 0x7F
    assert indexer_logits(q, k, scales, weights, *limits, impl="triton")[:, 1].isnan().all()


# No context, less than the queries, one page exactly, a page and one more; two queries of a request in a tile of their
# own each; dead slots that point nowhere, NaN in the tails of pages.
@pytest.mark.parametrize(("q_len", "page_size"), [(1, 16), (3, 5)])
def test_paged(q_len, page_size):
    lens = [0, 1, 16, 17, 40]
    generator = torch.Generator().manual_seed(1)
    table = random_page_table(lens, page_size=page_size, device="cpu", generator=generator, dead_slot=-(2**30))
    codes = torch.randn(table.num_pages, page_size, 32, generator=generator).to(F8)
    scales = torch.rand(table.num_pages, page_size, generator=generator) + 0.5
    dead = torch.ones(table.num_pages * page_size, dtype=torch.bool)
    dead[table.slots] = False
    codes.view(torch.uint8).view(-1, 32)[dead] = 0x7F
    scales.view(-1)[dead] = torch.nan
    cache = pack_index_cache(codes, scales)
    q = torch.randn(len(lens), q_len, 3, 32, generator=generator).to(F8)
    weights = torch.randn(len(lens), q_len, 3, generator=generator)
    arguments = (q, cache, weights, table.block_table, table.seq_lens)
    out = indexer_logits_paged(*arguments, max_context_len=43, impl="triton")
    _same(out, _in(torch.float64, indexer_logits_paged_reference, *arguments, 43))


def _rows(columns):
    """Rows that a selection can go wrong on."""
    generator = torch.Generator().manual_seed(columns)
    normal = torch.randn(columns, generator=generator)
    rows = [
        normal,
        normal.sort().values,
        normal.sort(descending=True).values,
        normal.round(),  # ties everywhere
        torch.zeros(columns),
        torch.where(torch.arange(columns) % 3 == 0, 1.0, -0.0),
        normal.relu(),
        normal * 1e-42,  # denormal numbers
        torch.where(normal > 1.5, normal, -torch.inf),  # few that count
        torch.where(normal > 0.5, torch.inf, normal),
        torch.where(normal > 2, torch.nan, normal),
        torch.where(normal > 2, torch.nan, -torch.inf).copysign(-normal),
        torch.full((columns,), -torch.inf),
        normal.exp().exp(),
    ]
    return torch.stack(rows)


# Held in registers; longer than that, so that a sample and candidates are taken, with room enough and with so little
# that every row is searched where it lies. Columns that are no multiple of four, of a block, of anything. The
# interpreter takes half a second a row: not all of them everywhere.
@pytest.mark.parametrize(
    ("columns", "k", "rows", "config"),
    [
        (256, 40, range(14), TopkConfig(256, 64, 64, 1, 1)),
        (77, 100, range(14), TopkConfig(128, 64, 64, 1, 1)),
        (1201, 100, (0, 1, 3, 8, 10), TopkConfig(512, 256, 512, 1, 1)),
        (1200, 40, (0, 4), TopkConfig(256, 128, 512, 2, 1, prefetch=False)),
        (600, 1, (2, 4, 11), TopkConfig(256, 512, 512, 1, 1)),
        (301, 30, (0, 3, 5, 12), TopkConfig(64, 64, 256, 1, 1)),
    ],
)
def test_selection(columns, k, rows, config):
    logits = _rows(columns)[list(rows)]
    out = torch.full((logits.shape[0], k), -7, dtype=torch.int32)
    launch_select_topk(logits, k, None, out, config)
    assert torch.equal(out, select_topk_reference(logits, k))


# Lengths of nothing, less than nothing, less than k, k, more, more than there is.
def test_selection_of_rows_of_any_length():
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([0, -3, 5, 20, 21, 64, 99, 1000], dtype=torch.int32)
    behind = torch.arange(100) >= lengths[:, None]
    out = select_topk(logits.masked_fill(behind, torch.nan), 20, lengths, impl="triton")
    assert torch.equal(out, select_topk_reference(logits, 20, lengths))
    rows_apart = logits[::2, 3:90]
    assert torch.equal(select_topk(rows_apart, 20, impl="triton"), select_topk_reference(rows_apart, 20))


# More columns than a program takes; rows that are not next to one another; no columns at all.
def test_slots():
    generator = torch.Generator().manual_seed(4)
    table = torch.randperm(300, generator=generator).int().view(3, 100)
    indices = torch.randint(-1, 700, (3, 1030), generator=generator, dtype=torch.int32)
    for some, page_size in ((indices, 7), (indices[:, 5:50], 16), (indices[:, :0], 64)):
        out = torch.full(some.shape, -7, dtype=torch.int32)
        launch_slots_of(some, table, page_size, out)
        assert torch.equal(out, slots_of(some, table, page_size))


def test_operators_keep_their_schemas():
    # Its schema check compares inputs before and after with torch.allclose, which float8 does not have.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    arguments = _inputs(3, 40, 4, 32)
    end = torch.tensor([5, 6, 40], dtype=torch.int32)
    torch.library.opcheck(ops.indexer_logits, (*arguments, None, None), test_utils=checks)
    torch.library.opcheck(ops.indexer_logits, (*arguments, end - 5, end), test_utils=checks)
    cache = pack_index_cache(torch.zeros(2, 8, 32).to(F8), torch.ones(2, 8))
    table, lens = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([11], dtype=torch.int32)
    paged = (arguments[0][None, :1].contiguous(), cache, arguments[3][None, :1].contiguous(), table, lens, 12, "triton")
    torch.library.opcheck(ops.indexer_logits_paged, paged, test_utils=checks)
    torch.library.opcheck(ops.select_topk, (torch.randn(2, 40), 7, None))
    torch.library.opcheck(ops.select_topk, (torch.randn(3, 40), 7, end))
