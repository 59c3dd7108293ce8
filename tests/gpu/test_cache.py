from typing import Any

import pytest
import torch

from mlakit.cache import append_latent, gather_latent, ops, pack_fp8, unpack_fp8
from mlakit.cache.reference import append_latent_reference, gather_latent_reference
from mlakit.testing import assert_close, count_poison, poison_, random_paged_cache

pytestmark = pytest.mark.gpu


def _tokens(count: int, rank: int, rope: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    kv = torch.randn(count, rank + rope + 5, dtype=dtype, device="cuda")[:, 2:-3]  # rows apart and off by two elements
    angles = torch.rand(4096, rope // 2, device="cuda") * 6.28
    table = torch.polar(torch.ones_like(angles), angles)
    return kv, torch.rand(rank, device="cuda").to(dtype) + 0.5, table.real, table.imag


# DeepSeek's widths in a batch of decode and one of prefill, widths that are no power of two, a single pair, pages of
# one token; a third of the tokens skipped; a layer of a cache that holds several.
@pytest.mark.parametrize(
    ("count", "rank", "rope", "page_size"),
    [(1, 512, 64, 64), (4096, 512, 64, 64), (100, 200, 24, 4), (17, 1, 2, 1), (300, 256, 64, 16)],
)
@pytest.mark.parametrize("rope_layout", ["interleaved", "half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_append_against_float64(count, rank, rope, page_size, rope_layout, dtype):
    pages = 2 * (-(-count // page_size)) + 1
    kv, weight, cos, sin = _tokens(count, rank, rope, dtype)
    positions = torch.randint(0, 4096, (count,), device="cuda")
    slots = torch.randperm(pages * page_size, device="cuda")[:count]
    slots[1::3] = -1
    cache = poison_(torch.empty(pages, 2, page_size, rank + rope, dtype=dtype, device="cuda"))[:, 1]
    options: Any = {"positions": positions, "rope_layout": rope_layout}
    append_latent(kv, weight, cos, sin, cache, slots, **options)
    wide = torch.zeros(pages, page_size, rank + rope, dtype=torch.float64, device="cuda")
    eager = torch.zeros(pages, page_size, rank + rope, dtype=dtype, device="cuda")
    append_latent_reference(kv.double(), weight.double(), cos.double(), sin.double(), wide, slots, **options)
    append_latent_reference(kv, weight, cos, sin, eager, slots, **options)
    written = slots[slots >= 0]
    where = written // page_size, written % page_size
    assert_close(cache[where], wide[where], eager[where])
    assert count_poison(cache) == (pages * page_size - written.numel()) * (rank + rope)  # and nothing else was touched


# A page that is not a power of two is a page too.
@pytest.mark.parametrize("page_size", [64, 1, 48])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_append_to_the_float8_cache(page_size, scale_fmt, dtype):
    count, pages = 500, 1 + 1000 // page_size
    kv, weight, cos, sin = _tokens(count, 512, 64, dtype)
    kv[3, :512] = 0
    slots = torch.randperm(pages * page_size, device="cuda")[:count]
    slots[5] = -1
    cache = torch.full((pages, page_size, 656), 255, dtype=torch.uint8, device="cuda")
    expected = cache.clone()
    wide = torch.zeros(pages, page_size, 576, dtype=torch.float64, device="cuda")
    append_latent(kv, weight, cos[:count], sin[:count], cache, slots, scale_fmt=scale_fmt)
    append_latent_reference(kv, weight, cos[:count], sin[:count], expected, slots, scale_fmt=scale_fmt)
    append_latent_reference(kv.double(), weight.double(), cos[:count].double(), sin[:count].double(), wide, slots)
    written = slots[slots >= 0]
    where = written // page_size, written % page_size
    got, eager = unpack_fp8(cache[where], dtype=torch.float32), unpack_fp8(expected[where], dtype=torch.float32)
    assert_close(got[:, :512], wide[where][:, :512], eager[:, :512], "latent")
    assert_close(got[:, 512:].bfloat16(), wide[where][:, 512:], eager[:, 512:].bfloat16(), "rope")
    assert (cache[where] != expected[where])[:, :512].float().mean() < 1e-3
    untouched = torch.ones(pages * page_size, dtype=torch.bool, device="cuda")
    untouched[written] = False
    assert (cache.view(-1, 656)[untouched] == 255).all()


# A latent whose mean square is exactly 1 comes out as the weight itself, with the signs of the token: no rounding of
# the norm is in the way, and every byte of the row must be that of the definition.
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_float8_row_is_bit_exact(scale_fmt, dtype):
    for _ in range(20):
        kv, weight, cos, sin = _tokens(64, 512, 64, dtype)
        kv[:, :512] = kv[:, :512].sign() + (kv[:, :512] == 0)
        cache = torch.zeros(1, 64, 656, dtype=torch.uint8, device="cuda")
        expected, slots = cache.clone(), torch.randperm(64, device="cuda")
        options: Any = {"eps": 0.0, "scale_fmt": scale_fmt}
        append_latent(kv, weight, cos[:64], sin[:64], cache, slots, **options)
        append_latent_reference(kv, weight, cos[:64], sin[:64], expected, slots, **options)
        assert torch.equal(cache[..., :528], expected[..., :528])


# Requests of no tokens at either end and between, one that just fills its pages, a page of one token, many requests;
# rows that a CUDA graph pads, and a total that is too small. Pages nobody promised hold NaN, dead slots of the table a
# page that is not there.
@pytest.mark.parametrize(
    ("lens", "page_size"), [([0, 5, 0, 128, 1, 0], 64), ([3], 1), ([0], 4), ([2, 700] * 150, 64), ([8192], 64)]
)
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("extra", [0, 3, -2])
def test_gather_is_exact(lens, page_size, is_fp8, extra):
    cached = random_paged_cache(lens, (576,), page_size=page_size, dtype=torch.bfloat16, device="cuda", dead_slot=2**30)
    pages = pack_fp8(cached.pages[..., :512], cached.pages[..., 512:]) if is_fp8 else cached.pages
    total = min(max(sum(lens) + extra, 0), cached.block_table.numel() * page_size)
    out = gather_latent(pages, cached.block_table, cached.seq_lens, total)
    cu_seqlens = torch.nn.functional.pad(cached.seq_lens.cumsum(0), (1, 0))
    expected = gather_latent_reference(pages, cached.block_table, cu_seqlens, total)
    assert torch.equal(out, expected)
    assert not out.isnan().any()


def test_gather_from_the_middle_of_a_context():
    lens = [900, 64, 300]
    cached = random_paged_cache(lens, (576,), page_size=64, dtype=torch.bfloat16, device="cuda")
    take = torch.tensor([100, 64, 0], dtype=torch.int32, device="cuda")
    starts = torch.tensor([777, 0, 20], dtype=torch.int32, device="cuda")
    rows = cached.pages.view(-1, 576)[cached.slots]
    got = gather_latent(cached.pages, cached.block_table, take, 164, starts=starts)
    assert torch.equal(got, torch.cat((rows[777:877], rows[900:964])))


@pytest.mark.parametrize("is_fp8", [False, True])
def test_caches_of_more_than_2_to_the_31_elements(is_fp8):
    width, dtype = (656, torch.uint8) if is_fp8 else (576, torch.bfloat16)
    pages = 2**31 // (64 * width) + 100
    cache = torch.zeros(pages, 64, width, dtype=dtype, device="cuda")
    kv, weight, cos, sin = _tokens(64, 512, 64, torch.bfloat16)
    slots = torch.arange(64, device="cuda") + (pages - 1) * 64
    append_latent(kv, weight, cos[:64], sin[:64], cache, slots)
    small = torch.zeros(1, 64, width, dtype=dtype, device="cuda")
    append_latent(kv, weight, cos[:64], sin[:64], small, slots % 64)
    assert torch.equal(cache[-1], small[0])
    assert not cache[:-1].any()
    table = torch.tensor([[pages - 1]], dtype=torch.int32, device="cuda")
    lens = torch.tensor([64], dtype=torch.int32, device="cuda")
    got = gather_latent(cache, table, lens, 64)
    assert torch.equal(got, unpack_fp8(small[0]) if is_fp8 else small[0])


def test_under_a_cuda_graph_with_changing_lengths():
    cache = torch.zeros(40, 64, 576, dtype=torch.bfloat16, device="cuda")
    kv, weight, cos, sin = _tokens(8, 512, 64, torch.bfloat16)
    slots, positions = (torch.zeros(8, dtype=torch.int64, device="cuda") for _ in range(2))
    slots.fill_(-1)
    table = torch.arange(40, dtype=torch.int32, device="cuda").view(2, 20)
    lens = torch.zeros(2, dtype=torch.int32, device="cuda")

    def step():
        append_latent(kv, weight, cos, sin, cache, slots, positions=positions)
        return gather_latent(cache, table, lens, 1000)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for new_lens in ([8, 0], [500, 500], [1, 64]):
        slots.copy_(torch.randperm(1200, device="cuda")[:8])
        positions.copy_(torch.randint(0, 4096, (8,), device="cuda"))
        lens.copy_(torch.tensor(new_lens))
        expected_cache = cache.clone()
        append_latent(kv, weight, cos, sin, expected_cache, slots, positions=positions)
        graph.replay()
        assert torch.equal(cache, expected_cache)
        assert torch.equal(out, gather_latent(cache, table, lens, 1000))


@pytest.mark.parametrize(("width", "dtype"), [(576, torch.bfloat16), (656, torch.uint8)])
def test_compiles_without_a_graph_break(width, dtype):
    weight = torch.rand(512, device="cuda", dtype=torch.bfloat16)
    table = torch.arange(10, dtype=torch.int32, device="cuda").view(1, 10)

    def step(kv, cos, sin, cache, slots, lens):
        append_latent(kv, weight, cos, sin, cache, slots)
        return gather_latent(cache, table, lens, slots.shape[0])

    compiled = torch.compile(step, fullgraph=True)
    for count in (8, 24, 40):  # the second length makes it dynamic
        kv, _, cos, sin = _tokens(count, 512, 64, torch.bfloat16)
        cos, sin = cos[:count].contiguous(), sin[:count].contiguous()
        one, other = torch.zeros(2, 10, 64, width, dtype=dtype, device="cuda")
        slots, lens = torch.arange(count, device="cuda"), torch.tensor([count], dtype=torch.int32, device="cuda")
        assert torch.equal(compiled(kv, cos, sin, one, slots, lens), step(kv, cos, sin, other, slots, lens))
        assert torch.equal(one, other)
        assert one[0, :8].any()


def test_operators_keep_their_schemas():
    kv, weight, cos, sin = _tokens(3, 128, 8, torch.float32)
    slots, positions = torch.tensor([0, 5, -1], device="cuda"), torch.tensor([4, 0, 1], device="cuda")
    cache = torch.zeros(2, 4, 136, device="cuda")
    torch.library.opcheck(
        ops.append_latent, (kv, weight, cos, sin, cache, slots, positions, 1e-6, "interleaved", None, "triton")
    )
    table = torch.tensor([[1, 0]], dtype=torch.int32, device="cuda")
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32, device="cuda")
    torch.library.opcheck(ops.gather_latent, (cache, table, cu_seqlens, 6, None, 128, torch.float32, "triton"))
