from typing import Any

import pytest
import torch

from mlakit.cache import append_latent, fp8_row_bytes, gather_latent, ops, pack_fp8, unpack_fp8
from mlakit.cache.reference import append_latent_reference, gather_latent_reference
from mlakit.testing import assert_close, count_poison, poison_, random_paged_cache

pytestmark = pytest.mark.interpret


def _tokens(count: int, rank: int, rope: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    kv = torch.randn(count, rank + rope + 5, dtype=dtype)[:, 2:-3]  # rows apart and off by two elements
    table = torch.polar(torch.ones(50, rope // 2), torch.rand(50, rope // 2) * 6.28)
    return kv, torch.rand(rank).to(dtype) + 0.5, table.real, table.imag


# DeepSeek's widths, widths that are no power of two, a single pair and a page of one token; some tokens skipped; both
# layouts.
@pytest.mark.parametrize(("rank", "rope", "page_size"), [(512, 64, 16), (200, 24, 4), (1, 2, 1)])
@pytest.mark.parametrize("rope_layout", ["interleaved", "half"])
@pytest.mark.parametrize("with_positions", [False, True])
def test_append_against_float64(rank, rope, page_size, rope_layout, with_positions):
    count, pages = 7, 12
    kv, weight, cos, sin = _tokens(count, rank, rope, torch.float16)
    positions = torch.randint(0, 50, (count,), dtype=torch.int32) if with_positions else None
    if positions is None:
        cos, sin = cos[:count], sin[:count]
    slots = torch.randperm(pages * page_size)[:count]
    slots[2] = -1
    cache = poison_(torch.empty(pages, 2, page_size, rank + rope, dtype=torch.float16))[:, 1]  # a layer of several
    options: Any = {"positions": positions, "rope_layout": rope_layout, "eps": 1e-5}
    append_latent(kv, weight, cos, sin, cache, slots, impl="triton", **options)
    wide, eager = torch.zeros(2, pages, page_size, rank + rope, dtype=torch.float64)
    append_latent_reference(kv.double(), weight.double(), cos.double(), sin.double(), wide, slots, **options)
    half = eager.half()
    append_latent_reference(kv, weight, cos, sin, half, slots, **options)
    written = slots[slots >= 0]
    where = written // page_size, written % page_size
    assert_close(cache[where], wide[where], half[where])
    assert count_poison(cache) == (pages * page_size - written.numel()) * (rank + rope)  # and nothing else was touched


# One group and four, and a rope part whose scales' offset is odd in units of 16 bytes.
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (128, 6)])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_append_to_the_float8_cache(rank, rope, scale_fmt):
    kv, weight, cos, sin = _tokens(5, rank, rope, torch.float16)
    kv[3, :rank] = 0
    slots = torch.tensor([3, 9, -1, 0, 6])
    cache = torch.full((3, 4, fp8_row_bytes(rank, rope)), 255, dtype=torch.uint8)
    expected, wide = cache.clone(), torch.zeros(3, 4, rank + rope, dtype=torch.float64)
    append_latent(kv, weight, cos[:5], sin[:5], cache, slots, scale_fmt=scale_fmt, impl="triton")
    append_latent_reference(kv, weight, cos[:5], sin[:5], expected, slots, scale_fmt=scale_fmt)
    append_latent_reference(kv.double(), weight.double(), cos[:5].double(), sin[:5].double(), wide, slots)
    written = [0, 3, 6, 9]
    got, eager = cache.view(12, -1)[written], expected.view(12, -1)[written]
    assert (cache.view(12, -1)[[1, 2, 4, 5, 7, 8, 10, 11]] == 255).all()
    scales, eager_scales = (rows[:, rank : rank + rank // 32].contiguous().view(torch.float32) for rows in (got, eager))
    torch.testing.assert_close(scales, eager_scales, rtol=2**-10, atol=0)
    # The codes of most values agree; where the latent's last bit differs, so may the code.
    assert (got[:, :rank] != eager[:, :rank]).float().mean() < 0.01
    values = [unpack_fp8(rows, rank, torch.float32) for rows in (got, eager)]
    assert_close(values[0][:, :rank], wide.view(12, -1)[written, :rank], values[1][:, :rank])
    # Triton's interpreter cuts to bfloat16 where the hardware rounds.
    torch.testing.assert_close(values[0][:, rank:], values[1][:, rank:], rtol=2**-7, atol=1e-6)


# Requests of no tokens at either end and between, one that fills its pages, a page of one token; more rows than one
# program takes.
@pytest.mark.parametrize(("lens", "page_size"), [([0, 5, 0, 16, 1, 0], 4), ([3], 1), ([0], 4), ([2] * 17, 64)])
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("extra", [0, 3, -2])
def test_gather_is_exact(lens, page_size, is_fp8, extra):
    cached = random_paged_cache(
        lens, (576,), page_size=page_size, dtype=torch.float16, device="cpu", dead_slot=2**30, spare_pages=2
    )
    pages = cached.pages
    if is_fp8:
        pages = pack_fp8(pages[..., :512], pages[..., 512:])
    total = min(max(sum(lens) + extra, 0), cached.block_table.numel() * page_size)
    out = gather_latent(pages, cached.block_table, cached.seq_lens, total, dtype=torch.float32, impl="triton")
    cu_seqlens = torch.nn.functional.pad(cached.seq_lens.cumsum(0), (1, 0))
    expected = gather_latent_reference(pages, cached.block_table, cu_seqlens, total, dtype=torch.float32)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


def test_gather_from_the_middle_of_a_context_of_a_strided_cache():
    cached = random_paged_cache([9, 6, 4], (40,), page_size=2, dtype=torch.float32, device="cpu")
    layered = torch.full((cached.pages.shape[0], 2, 3, 40), torch.nan)
    layered[:, 1, :2] = cached.pages
    rows = cached.pages.view(-1, 40)[cached.slots]
    lens, starts = torch.tensor([4, 3, 0], dtype=torch.int32), torch.tensor([5, 1, 4], dtype=torch.int64)
    got = gather_latent(layered[:, 1, :2], cached.block_table, lens, 7, starts=starts, impl="triton")
    assert torch.equal(got, torch.cat((rows[5:9], rows[10:13])))


def test_operators_keep_their_schemas():
    kv, weight, cos, sin = _tokens(3, 128, 8, torch.float32)
    slots, positions = torch.tensor([0, 5, -1]), torch.tensor([4, 0, 1])
    cache = torch.zeros(2, 4, 136)
    torch.library.opcheck(
        ops.append_latent, (kv, weight, cos, sin, cache, slots, positions, 1e-6, "interleaved", None, "triton")
    )
    table, cu_seqlens = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([0, 6], dtype=torch.int32)
    torch.library.opcheck(ops.gather_latent, (cache, table, cu_seqlens, 6, None, 128, torch.float32, "triton"))


def test_compiles_without_a_graph_break():
    kv, weight, cos, sin = _tokens(6, 128, 8, torch.float32)
    table, lens = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    slots = torch.tensor([4, 5, 6, 7, 0, 1])

    def step(cache):
        append_latent(kv, weight, cos[:6], sin[:6], cache, slots, impl="triton")
        return gather_latent(cache, table, lens, 6, impl="triton")

    one, other = torch.zeros(2, 2, 4, 136)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(one)
    assert torch.equal(got, step(other))
    assert torch.equal(one, other)  # the write was not optimized away
    assert got.any()


def test_append_counts_as_a_change_in_place():
    kv, weight, cos, sin = _tokens(1, 128, 8, torch.float32)
    cache = torch.zeros(1, 1, 136)
    before = cache._version
    append_latent(kv, weight, cos[:1], sin[:1], cache, torch.tensor([0]), impl="triton")
    assert cache._version > before
