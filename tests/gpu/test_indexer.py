import pytest
import torch

from mlakit.indexer import (
    indexer_logits,
    indexer_logits_paged,
    ops,
    pack_index_cache,
    quantize_queries,
    select_topk,
    slots_of,
)
from mlakit.indexer.config import LogitsConfig, TopkConfig
from mlakit.indexer.hopper_config import HopperLogitsConfig, HopperTopkConfig
from mlakit.indexer.hopper_launch import (
    launch_indexer_logits_hopper,
    launch_indexer_logits_paged_hopper,
    launch_select_topk_hopper,
)
from mlakit.indexer.reference import (
    indexer_logits_paged_reference,
    indexer_logits_reference,
    select_topk_reference,
)
from mlakit.indexer.triton_logits import launch_indexer_logits
from mlakit.indexer.triton_topk import launch_select_topk
from mlakit.testing import assert_close, poison_, random_page_table

pytestmark = pytest.mark.gpu
F8 = torch.float8_e4m3fn
Limits = tuple[torch.Tensor | None, torch.Tensor | None]
# Its schema check compares inputs before and after with torch.allclose, which float8 does not have.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


IMPLS = ["triton", None]  # the portable kernels, and the fastest that can run


def _in(dtype, reference, *arguments):
    return reference(*arguments, dtype=dtype)


def _inputs(
    s_q: int, s_kv: int, heads: int = 64, dim: int = 128
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(s_q, heads, dim, device="cuda").to(F8)
    k = torch.randn(s_kv, dim, device="cuda").to(F8)
    return q, k, torch.rand(s_kv, device="cuda") + 0.5, torch.randn(s_q, heads, device="cuda")


def _check(out, reference, eager):
    """Equal -inf, and close where there are numbers. `eager` is the same sum in bfloat16."""
    assert torch.equal(torch.isneginf(out), torch.isneginf(reference))
    seen = ~torch.isneginf(reference)
    assert_close(out[seen], reference[seen], eager[seen].float())


# DeepSeek's heads and width; a single query and key; more keys than a program of few queries takes, odd sizes all
# through; few heads, heads that are no power of two, other widths.
@pytest.mark.parametrize(
    ("s_q", "s_kv", "heads", "dim"),
    [
        (300, 4100, 64, 128),
        (1, 1, 64, 128),
        (3, 33333, 64, 128),
        (65, 127, 32, 128),
        (33, 200, 5, 64),
        (7, 99, 128, 32),
    ],
)
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_logits_against_float64(s_q, s_kv, heads, dim, limited, impl):
    arguments = _inputs(s_q, s_kv, heads, dim)
    limits: Limits = (None, None)
    if limited:  # some of them empty, before the first key or behind the last
        end = torch.randint(-3, s_kv + 5, (s_q,), device="cuda", dtype=torch.int32)
        limits = (torch.randint(-3, s_kv, (s_q,), device="cuda", dtype=torch.int32), end)
    out = indexer_logits(*arguments, *limits, impl=impl)
    reference = _in(torch.float64, indexer_logits_reference, *arguments, *limits)
    _check(out, reference, _in(torch.bfloat16, indexer_logits_reference, *arguments, *limits))


CONFIGS = [
    LogitsConfig(2, 64, 4, 3, split=1024, descriptors=True),
    LogitsConfig(2, 128, 8, 3, split=512, descriptors=True),
    LogitsConfig(1, 128, 4, 4, split=256),
    LogitsConfig(4, 64, 8, 2),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_kind_of_configuration(config):
    arguments = _inputs(131, 3001)
    end = torch.arange(131, device="cuda", dtype=torch.int32) + 2871
    start = torch.where(torch.arange(131, device="cuda") < 70, 0, 1500).int()
    out = poison_(torch.empty(131, 3001, device="cuda"))
    launch_indexer_logits(*arguments, start, end, out, config)
    reference = _in(torch.float64, indexer_logits_reference, *arguments, start, end)
    _check(out, reference, _in(torch.bfloat16, indexer_logits_reference, *arguments, start, end))


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_that_nobody_sees_are_not_read(impl):
    q, k, scales, weights = _inputs(10, 4096)
    k.view(torch.uint8)[2048:] = 0x7F
    scales[2048:] = torch.nan
    end = torch.full((10,), 2000, device="cuda", dtype=torch.int32)
    out = indexer_logits(q, k, scales, weights, None, end, impl=impl)
    assert not out.isnan().any()
    k.view(torch.uint8)[7, 3] = 0x7F
    assert indexer_logits(q, k, scales, weights, None, end, impl=impl)[:, 7].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_more_than_2_to_the_31_logits_and_elements(impl):
    q, k, scales, weights = _inputs(20000, 110_001)
    out = indexer_logits(q, k, scales, weights, impl=impl)
    rows = slice(0, None, 9999)
    reference = _in(torch.float64, indexer_logits_reference, q[rows], k, scales, weights[rows])
    eager = _in(torch.bfloat16, indexer_logits_reference, q[rows], k, scales, weights[rows])
    assert_close(out[rows], reference, eager.float())
    chosen = select_topk(out, 2048, impl=impl)
    assert torch.equal(chosen[rows], select_topk_reference(out[rows], 2048))


def _paged(lens, page_size, q_len, heads=64, dim=128, spare_pages=3):
    table = random_page_table(lens, page_size=page_size, device="cuda", dead_slot=-(2**30), spare_pages=spare_pages)
    codes = torch.randn(table.num_pages, page_size, dim, device="cuda").to(F8)
    scales = torch.rand(table.num_pages, page_size, device="cuda") + 0.5
    dead = torch.ones(table.num_pages * page_size, dtype=torch.bool, device="cuda")
    dead[table.slots] = False
    codes.view(torch.uint8).view(-1, dim)[dead] = 0x7F
    scales.view(-1)[dead] = torch.nan
    q = torch.randn(len(lens), q_len, heads, dim, device="cuda").to(F8)
    weights = torch.randn(len(lens), q_len, heads, device="cuda")
    return q, pack_index_cache(codes, scales), weights, table.block_table, table.seq_lens


# No context, less than the queries, a page, a page and one more, long; the page of DeepSeek, one of a single token, one
# that no tile is a multiple of.
@pytest.mark.parametrize(("q_len", "page_size"), [(1, 64), (2, 64), (3, 128), (5, 16), (2, 1), (3, 48)])
@pytest.mark.parametrize("impl", IMPLS)
def test_paged_against_float64(q_len, page_size, impl):
    arguments = _paged([0, 1, 64, 65, 3000, 9999], page_size, q_len)
    out = indexer_logits_paged(*arguments, max_context_len=10007, impl=impl)
    reference = _in(torch.float64, indexer_logits_paged_reference, *arguments, 10007)
    _check(out, reference, _in(torch.bfloat16, indexer_logits_paged_reference, *arguments, 10007))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_cache_of_more_than_2_to_the_31_bytes(impl):
    q, cache, weights, table, lens = _paged([5000, 300], 64, 1)
    pages = 2**31 // cache[0].numel() + 1000
    large = torch.empty(pages, *cache.shape[1:], dtype=torch.uint8, device="cuda")
    large[-cache.shape[0] :] = cache
    moved = torch.where(table >= 0, table + pages - cache.shape[0], table)
    out = indexer_logits_paged(q, large, weights, moved, lens, max_context_len=5000, impl=impl)
    assert torch.equal(out, indexer_logits_paged(q, cache, weights, table, lens, max_context_len=5000, impl=impl))


def _rows(columns):
    """Rows that a selection can go wrong on."""
    normal = torch.randn(columns, device="cuda")
    trend = torch.arange(columns, device="cuda") / columns
    return torch.stack(
        [
            normal,
            normal.sort().values,
            normal.sort(descending=True).values,
            normal.round(),  # ties everywhere
            (normal * 1000).round(),
            torch.zeros(columns, device="cuda"),
            torch.where(torch.arange(columns, device="cuda") % 3 == 0, 1.0, -0.0),
            normal.relu(),
            normal * 1e-42,  # denormal numbers
            torch.where(normal > 1.5, normal, -torch.inf),
            torch.where(normal > 0.5, torch.inf, normal),
            torch.where(normal > 2, torch.nan, normal),
            torch.where(normal > 2, torch.nan, -torch.inf).copysign(-normal),
            torch.full((columns,), -torch.inf, device="cuda"),
            (normal * 5).exp().exp(),
            normal + 10 * trend,  # the newest are the largest
            torch.where(trend > 0.97, normal + 8, normal),
            torch.where(torch.arange(columns, device="cuda") % 64 < 8, normal + 8, normal),  # where a sample looks
        ]
    )


def _rows_that_differ(out, expected):
    return (out != expected).any(dim=1).nonzero().flatten().tolist()


# Every size of registers the launcher knows, held in them and sampled, up to the longest context; columns that are no
# multiple of four; k of 1, odd, DeepSeek's, the largest, more than there are columns.
@pytest.mark.parametrize(
    ("columns", "k"),
    [
        (1, 1), (63, 64), (1000, 2048), (2048, 2048), (4096, 2048), (4099, 127), (8192, 2048), (8191, 1),
        (32768, 2048), (33333, 2048), (40000, 4096), (131072, 2048), (163840, 512), (1_000_003, 2048),
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", IMPLS)
def test_selection_is_exact(columns, k, impl):
    logits = _rows(columns)
    out = select_topk(logits, k, impl=impl)
    assert _rows_that_differ(out, select_topk_reference(logits, k)) == []
    lengths = torch.randint(-5, columns + 5, (logits.shape[0],), device="cuda", dtype=torch.int32)
    behind = torch.arange(columns, device="cuda") >= lengths[:, None]
    poisoned = logits.masked_fill(behind, torch.nan)
    assert (
        _rows_that_differ(select_topk(poisoned, k, lengths, impl=impl), select_topk_reference(logits, k, lengths)) == []
    )


# As many rows as keep every program at several of them; a sample of more than a short row has; room for so few
# candidates that rows are searched in place.
@pytest.mark.parametrize(
    "config", [None, TopkConfig(2048, 4096, 1024, 4, 8, 64), TopkConfig(1024, 256, 2048, 8, 4, None, False)]
)
def test_selection_of_many_rows(config):
    logits = torch.randn(4001, 9000, device="cuda")
    lengths = (torch.arange(4001, device="cuda") * 2 + 900).int()
    out = torch.full((4001, 1000), -7, device="cuda", dtype=torch.int32)
    launch_select_topk(logits, 1000, lengths, out, config)
    assert torch.equal(out, select_topk_reference(logits, 1000, lengths))
    again = torch.full_like(out, -7)
    launch_select_topk(logits, 1000, lengths, again, config)
    assert torch.equal(out, again)


# DeepSeek's k and page; rows that are not next to one another, dead table slots, a page size that is no power of two.
def test_slots_are_those_of_pytorch():
    table = torch.randint(0, 10_000, (300, 500), device="cuda", dtype=torch.int32)
    indices = torch.randint(-1, 500 * 48, (300, 2048), device="cuda", dtype=torch.int32)
    table[:, 400:] = -(2**30)
    for some, page_size in ((indices.clamp(max=400 * 48 - 1), 48), (indices[:, 7:1500].clamp(max=400 * 16 - 1), 16)):
        assert torch.equal(slots_of(some, table, page_size).cpu(), slots_of(some.cpu(), table.cpu(), page_size))


def test_under_a_cuda_graph_with_changing_lengths():
    arguments = _paged([700, 1300, 3000], 64, 2)
    lens = arguments[-1]

    def step():
        logits = indexer_logits_paged(*arguments, max_context_len=6000)
        chosen = select_topk(logits, 512, lens.repeat_interleave(2))
        return logits, slots_of(chosen, arguments[3].repeat_interleave(2, 0), 64)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new in ([700, 1300, 3000], [1, 1290, 0], [640, 5, 2999]):
        lens.copy_(torch.tensor(new))
        graph.replay()
        for one, other in zip(captured, step(), strict=True):
            assert torch.equal(one, other)


def test_compiles_without_a_graph_break():
    def attend(q, k, scales, weights, end):
        logits = indexer_logits(q, k, scales, weights, None, end)
        return logits, select_topk(logits * 2, 64, end)

    compiled = torch.compile(attend, fullgraph=True)
    for s_q in (8, 24, 40):  # the second length makes it dynamic
        arguments = _inputs(s_q, 500)
        end = torch.arange(s_q, device="cuda", dtype=torch.int32) + 400
        for got, expected in zip(compiled(*arguments, end), attend(*arguments, end), strict=True):
            assert torch.equal(got, expected)


def test_paged_logits_compile_without_a_graph_break():
    arguments = _paged([700, 1300, 5], 64, 2)

    def step(q, cache, weights, *tables):
        return indexer_logits_paged(q, cache, weights * 2, *tables, max_context_len=1300) * 2

    assert torch.equal(torch.compile(step, fullgraph=True)(*arguments), step(*arguments))


def test_operators_keep_their_schemas():
    arguments = _inputs(3, 40)
    end = torch.tensor([5, 6, 40], dtype=torch.int32, device="cuda")
    torch.library.opcheck(ops.indexer_logits, (*arguments, None, None), test_utils=CHECKS)
    torch.library.opcheck(ops.indexer_logits, (*arguments, end - 5, end), test_utils=CHECKS)
    torch.library.opcheck(ops.indexer_logits_paged, (*_paged([5, 70], 64, 1), 80), test_utils=CHECKS)
    logits = indexer_logits(*arguments)
    torch.library.opcheck(ops.select_topk, (logits, 7, None))
    torch.library.opcheck(ops.select_topk, (logits, 7, end))


def test_quantized_queries_score_as_the_wide_ones():
    q = torch.randn(40, 64, 128, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(40, 64, device="cuda")
    codes, scaled = quantize_queries(q, weights)
    _, k, scales, _ = _inputs(1, 300)
    out = indexer_logits(codes, k, scales, scaled).double()
    wide = (q.double() @ (k.double() * scales[:, None]).T).relu()
    expected = (weights.double()[:, :, None] * wide).sum(1)
    assert (out - expected).norm() < 0.05 * expected.norm()


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="kernels for Hopper"
)


# Pages of a tile and of three; parts of one tile, of an odd and an even number, fewer than there are stages and more;
# all heads there are, queries that fill their tiles and do not; requests without keys and with fewer than queries.
@on_hopper
@pytest.mark.parametrize(
    ("q_len", "page_size", "heads", "config"),
    [
        (1, 64, 64, HopperLogitsConfig(1, 512, 4)),
        (3, 64, 64, HopperLogitsConfig(2, 1024, 2)),
        (4, 192, 64, HopperLogitsConfig(2, 64, 4)),
        (4, 64, 32, HopperLogitsConfig(4, 192, 1)),
        (2, 64, 128, HopperLogitsConfig(1, 320, 2)),
        (3, 64, 32, HopperLogitsConfig(2, 10048, 8)),
    ],
)
def test_paged_logits_of_every_kind_of_launch(q_len, page_size, heads, config):
    arguments = _paged([0, 1, 2, 63, 64, 65, 3000, 9999], page_size, q_len, heads)
    out = poison_(torch.empty(8 * q_len, 10007, device="cuda"))
    q, cache, weights, table, lens = arguments
    launch_indexer_logits_paged_hopper(q, cache, weights, table, lens, out, config)
    reference = _in(torch.float64, indexer_logits_paged_reference, *arguments, 10007)
    _check(out, reference, _in(torch.bfloat16, indexer_logits_paged_reference, *arguments, 10007))
    again = poison_(torch.empty_like(out))
    launch_indexer_logits_paged_hopper(q, cache, weights, table, lens, again, config)
    assert torch.equal(out, again)


# More items than there are programs, so that each goes from one to the next, of a tile or fewer, of none, of an odd
# number; a last row of queries that do not fill it; rows that begin at any multiple of 4 bytes; all heads there are;
# programs of one warpgroup and of four.
@on_hopper
@pytest.mark.parametrize(
    ("s_q", "s_kv", "heads", "config"),
    [
        (1301, 1000, 64, HopperLogitsConfig(2, 1024)),
        (301, 2999, 64, HopperLogitsConfig(2, 64, 4)),
        (333, 4001, 32, HopperLogitsConfig(4, 192, 1)),
        (700, 777, 128, HopperLogitsConfig(1, 320, 2)),
        (200, 5000, 64, HopperLogitsConfig(1, 128, 8)),
        (1301, 1000, 64, HopperLogitsConfig(2, 1024, 4, shared=True)),
        (301, 2999, 64, HopperLogitsConfig(2, 64, 4, shared=True)),
        (700, 777, 128, HopperLogitsConfig(1, 320, 2, shared=True)),
    ],
)
def test_logits_of_every_kind_of_launch(s_q, s_kv, heads, config):
    arguments = _inputs(s_q, s_kv, heads)
    token = torch.arange(s_q, device="cuda", dtype=torch.int32)
    wild = torch.randint(-3, s_kv, (s_q,), device="cuda", dtype=torch.int32)
    causal = token + s_kv - s_q + 1
    windows = (token % 7 * 300, token % 7 * 300 + token % 5 * 100)  # some empty, as packed sequences have them
    bands = [(torch.zeros_like(token), causal), (causal - 400, causal), (wild, wild + 70), windows]
    for start, end in [(None, None), *bands]:
        out = poison_(torch.empty(s_q, s_kv, device="cuda"))
        launch_indexer_logits_hopper(*arguments, start, end, out, config)
        reference = _in(torch.float64, indexer_logits_reference, *arguments, start, end)
        _check(out, reference, _in(torch.bfloat16, indexer_logits_reference, *arguments, start, end))
        again = poison_(torch.empty_like(out))
        launch_indexer_logits_hopper(*arguments, start, end, again, config)
        assert torch.equal(out, again)


@on_hopper
def test_logits_of_what_is_not_in_one_piece():
    q, k, scales, weights = _inputs(40, 500)
    expected = indexer_logits(q, k, scales, weights, impl="triton")
    apart = torch.zeros(500, 256, dtype=torch.uint8, device="cuda").view(F8)
    apart[:, 64:192] = k
    wide = torch.zeros(40, 100, device="cuda")
    wide[:, 7:71] = weights
    out = indexer_logits(q, apart[:, 64:192], scales, wide[:, 7:71], impl="hopper")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
    two = torch.stack([q, q], 1)[:, 0]
    with pytest.raises(RuntimeError, match="contiguous queries"):
        indexer_logits(two, k, scales, weights, impl="hopper")
    assert torch.equal(indexer_logits(two, k, scales, weights), expected)


@on_hopper
def test_what_it_cannot_run_is_refused_when_named():
    with pytest.raises(RuntimeError, match="heads must be 32, 64 or 128, got 5"):
        indexer_logits(*_inputs(3, 40, 5), impl="hopper")
    with pytest.raises(RuntimeError, match="page size that is a multiple of 64, got 16"):
        indexer_logits_paged(*_paged([40], 16, 1), max_context_len=40, impl="hopper")
    with pytest.raises(RuntimeError, match="heads must be 32, 64 or 128, got 40"):
        indexer_logits_paged(*_paged([40], 64, 1, heads=40), max_context_len=40, impl="hopper")
    q, *rest = _paged([40, 3], 64, 1)
    moved = torch.empty(q.numel() + 16, dtype=torch.uint8, device="cuda")[8:-8].view(F8).view(q.shape).copy_(q)
    with pytest.raises(RuntimeError, match="multiples of 16, got 8 mod 16"):
        indexer_logits_paged(moved, *rest, max_context_len=40, impl="hopper")
    expected = indexer_logits_paged(q, *rest, max_context_len=40, impl="triton")
    assert torch.equal(indexer_logits_paged(moved, *rest, max_context_len=40), expected)
    with pytest.raises(RuntimeError, match="k must be at most 2048, got 2049"):
        select_topk(torch.zeros(1, 4000, device="cuda"), 2049, impl="hopper")
    with pytest.raises(RuntimeError, match="up to 163840 columns, got 163841"):
        select_topk(torch.zeros(1, 163841, device="cuda"), 20, impl="hopper")


def _more_rows(columns):
    """Ranges that floats do not resolve, overflow, or lose in denormal numbers; one value that stretches all bins."""
    normal = torch.randn(columns, device="cuda")
    outlier = normal.clone()
    outlier[columns // 2] = 1e6
    rows = [normal + 1e6, normal * 1e38, torch.where(normal > 1, normal * 1e38, normal), normal * 1e-30, outlier]
    return torch.cat([_rows(columns), torch.stack(rows)])


# Rows that are held, of every number of values a thread, down to one column; candidates of a sample as large as the
# row and smaller; the longest row; either number of threads; k of 1, odd, DeepSeek's, more than there are columns.
@on_hopper
@pytest.mark.parametrize(
    ("columns", "k", "config"),
    [
        (1, 1, None), (63, 64, None), (1000, 2048, None), (2048, 2048, None), (4099, 127, None), (8191, 1, None),
        (8192, 2048, None), (16384, 2048, HopperTopkConfig(1024, 16, 0)), (9000, 2048, None), (33333, 100, None),
        (33333, 2048, HopperTopkConfig(512, 8, 2048, ahead=True)), (131072, 2048, None), (163840, 512, None),
        (40000, 1, HopperTopkConfig(1024, 4, 8192)), (5000, 1000, HopperTopkConfig(512, 4, 4096)),
    ],
)  # fmt: skip
def test_hopper_selection_is_exact(columns, k, config):
    logits = _more_rows(columns)
    out = torch.full((logits.shape[0], k), -7, device="cuda", dtype=torch.int32)
    launch_select_topk_hopper(logits, k, None, out, config)
    assert _rows_that_differ(out, select_topk_reference(logits, k)) == []
    lengths = torch.randint(-5, columns + 5, (logits.shape[0],), device="cuda", dtype=torch.int32)
    behind = torch.arange(columns, device="cuda") >= lengths[:, None]
    out.fill_(-7)
    launch_select_topk_hopper(logits.masked_fill(behind, torch.nan), k, lengths, out, config)
    assert _rows_that_differ(out, select_topk_reference(logits, k, lengths)) == []


# More rows than there is room for at once, rows apart from one another, lengths of all sizes; the same at every call.
@on_hopper
@pytest.mark.parametrize("columns", [9000, 5000])
def test_hopper_selection_of_many_rows(columns):
    logits = torch.randn(2001, 2 * columns, device="cuda")[:, 1 : columns + 1]
    lengths = (torch.arange(2001, device="cuda") * 4 + 900).int().clamp(max=columns)
    out = torch.full((2001, 1000), -7, device="cuda", dtype=torch.int32)
    launch_select_topk_hopper(logits, 1000, lengths, out)
    assert torch.equal(out, select_topk_reference(logits, 1000, lengths))
    again = torch.full_like(out, -7)
    launch_select_topk_hopper(logits, 1000, lengths, again)
    assert torch.equal(out, again)
