"""The Gluon kernel for the float8 cache of 656 bytes a token, on a Hopper, against float64."""

import pytest
import torch

from mlakit import which_impl
from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.decode import mla_decode
from mlakit.decode.all_slots import is_faster
from mlakit.hardware import capability
from mlakit.testing import count_poison, poison_
from tests.gpu.test_decode_fp8 import LENS, SCALE, Inputs, check, decode, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or capability("cuda") != (9, 0), reason="made for Hopper"),
]


def make_rows(lens: list[int], q_len: int, heads: int, page_size: int = 64, spare_pages: int = 3) -> Inputs:
    return make(
        lens, q_len, heads, kind="rows", q_dtype=torch.bfloat16, page_size=page_size, spare_pages=spare_pages
    )  # fmt: skip


# Heads: idle rows of a tile (1, 3, 9), a full one, more (17 to 128). New tokens: one, and more than some requests have
# keys. Pages at, below and above a tile. Splits: shared by the device, none, some, more than are merged at once.
CASES = (
    [(heads, 1, True, 64, None) for heads in (1, 3, 9, 16, 17, 32, 100, 128)]
    + [
        (heads, q_len, True, 64, None)
        for heads, q_len in ((1, 2), (9, 3), (8, 4), (5, 5), (2, 8), (4, 8), (16, 2), (64, 4))
    ]
    + [(heads, q_len, False, 64, None) for heads, q_len in ((4, 4), (8, 4), (3, 1))]
    + [(heads, q_len, True, size, None) for heads, q_len in ((16, 1), (10, 2)) for size in (16, 32, 128, 256, 4096)]
    + [(heads, q_len, True, 64, splits) for heads, q_len in ((16, 1), (7, 3)) for splits in (1, 2, 5, 13, 30, 50, 200)]
    + [(16, 2, True, 16, splits) for splits in (1, 3)]
)


@pytest.mark.parametrize(("heads", "q_len", "causal", "page_size", "num_splits"), CASES)
def test_against_float64(heads: int, q_len: int, causal: bool, page_size: int, num_splits: int | None) -> None:
    inputs = make_rows([*LENS, 8200], q_len, heads, page_size)
    out = poison_(torch.empty((len(LENS) + 1, q_len, heads, 512), dtype=torch.bfloat16, device="cuda"))
    options = {"causal": causal, "num_splits": num_splits, "impl": "hopper"}
    _, lse = decode(inputs, out=out, **options)
    assert count_poison(out) == 0
    check(inputs, out, lse, causal=causal)
    again, again_lse = decode(inputs, **options)
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)


# One request over the whole GPU, few and many pieces of each, one slot for each, and lengths so ragged that requests
# share slots.
@pytest.mark.parametrize(
    "lens", [[8192], [131_072], [4096] * 32, [1000] * 128, [300, 0, 77, 5000] * 30, list(range(0, 900, 3)), [0, 0]]
)
@pytest.mark.parametrize(("heads", "q_len"), [(16, 1), (32, 1), (3, 5)])
def test_batches(lens: list[int], heads: int, q_len: int) -> None:
    inputs = make_rows(lens, q_len, heads)
    first = decode(inputs, impl="hopper")
    check(inputs, *first)
    for _ in range(3):  # bit for bit the same, whichever program comes first
        for again, before in zip(decode(inputs, impl="hopper"), first, strict=True):
            assert torch.equal(again, before)


# Keys that differ by much in magnitude, so that each has another power of two; some are all zeros.
@pytest.mark.parametrize(("heads", "q_len", "num_splits"), [(9, 1, 5), (16, 1, None), (3, 4, 1), (16, 2, None)])
def test_keys_of_very_different_size(heads: int, q_len: int, num_splits: int | None) -> None:
    q, cache, table, lens = make_rows(LENS, q_len, heads)
    generator = torch.Generator("cuda").manual_seed(heads)
    size = torch.exp2(4 * torch.randn(cache.shape[:2], generator=generator, device="cuda"))
    size[torch.rand(size.shape, generator=generator, device="cuda") < 0.1] = 0
    latents = unpack_fp8(cache).float()
    inputs = (q, pack_fp8(latents[..., :512] * size[..., None], latents[..., 512:]), table, lens)
    check(inputs, *decode(inputs, num_splits=num_splits, impl="hopper"))


# Scores that grow from key to key, so that the maximum changes again and again; queries out of float16's range.
@pytest.mark.parametrize("factor", [2.0**-30, 1.0, 2.0**20])
def test_queries_and_scores_of_very_different_size(factor: float) -> None:
    q, cache, table, lens = make_rows([3000, 700, 64], 2, 16)
    growth = torch.linspace(0.1, 8.0, cache.shape[0] * 64, device="cuda").view(-1, 64, 1)
    latents = unpack_fp8(cache).float() * growth
    cache = pack_fp8(latents[..., :512] / factor, latents[..., 512:] / factor)
    inputs = (q * factor, cache, table, lens)
    check(inputs, *decode(inputs, impl="hopper"))


@pytest.mark.parametrize("page_size", [16, 64])
def test_cache_of_more_than_2_31_bytes(page_size: int) -> None:
    inputs = make_rows([5000, 3000], 1, 16, page_size, spare_pages=60_000 * 64 // page_size)
    assert inputs[1].numel() > 2**31
    assert int(inputs[2][0, : 5000 // page_size].max()) * page_size * 656 > 2**31
    check(inputs, *decode(inputs, impl="hopper"))


@pytest.mark.parametrize(("heads", "q_len"), [(16, 2), (12, 1)])
def test_cuda_graph_with_changing_lengths(heads: int, q_len: int) -> None:
    inputs = make_rows([3000, 64, 0, 900], q_len, heads)
    decode(inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(inputs, impl="hopper")
    for new_lens in ([3000, 64, 0, 900], [1, 0, 0, 2], [2048, 33, 0, 700], [0, 64, 0, 0]):
        inputs[3].copy_(torch.tensor(new_lens, dtype=torch.int32))
        poison_(out)
        poison_(lse)
        graph.replay()
        torch.cuda.synchronize()
        check(inputs, out, lse)


@pytest.mark.parametrize(("heads", "num_splits"), [(16, None), (16, 1), (17, None), (17, 1)])
def test_a_request_longer_than_its_table_is_loud_and_spares_the_others(heads: int, num_splits: int | None) -> None:
    q, cache, table, lens = make_rows([640, 640, 0], 1, heads)
    lens[0] = 641
    out, lse = decode((q, cache, table, lens), num_splits=num_splits, impl="hopper")
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert out[1:].isfinite().all()
    table = table[:, :0]  # and where there is no table at all
    out, lse = decode((q, cache, table, lens), num_splits=num_splits, impl="hopper")
    assert out[:2].isnan().all()
    assert lse[:2].isnan().all()
    assert not out[2].any()
    assert lse[2].isneginf().all()


# Query, output and cache with rows further apart, and a query that is not aligned.
@pytest.mark.parametrize("heads", [16, 10])
def test_strides(heads: int) -> None:
    q, cache, table, lens = make_rows([300, 70], 3, heads)
    spread = torch.full((*cache.shape[:2], 688), 255, dtype=torch.uint8, device="cuda")
    spread[..., 16:672] = cache
    apart = torch.empty((2, 3, heads, 578), dtype=q.dtype, device="cuda")[..., 1:577]
    apart.copy_(q)
    inputs = (apart, spread[..., 16:672], table, lens)
    out = poison_(torch.empty((2, 4, heads + 1, 512), dtype=q.dtype, device="cuda"))
    _, lse = decode(inputs, out=out[:, :3, :heads], impl="hopper")
    check((q, cache, table, lens), out[:, :3, :heads], lse)
    assert count_poison(out) == out.numel() - 2 * 3 * heads * 512


# Sparse attention is told all slots where that is faster; tables are too short for some, and rows far apart.
@pytest.mark.parametrize("impl", ["hopper", "triton"])
@pytest.mark.parametrize(("heads", "q_len", "causal"), [(128, 1, True), (50, 3, True), (64, 2, False)])
def test_many_heads_of_large_batches(impl: str, heads: int, q_len: int, causal: bool) -> None:
    lens = [0, 1, 2, 64, 700, 4097, 3000, 128] * 6
    q, cache, table, seq_lens = make_rows(lens, q_len, heads)
    inputs = (q, cache, table, seq_lens)
    out = poison_(torch.empty((len(lens), q_len, heads + 1, 512), dtype=q.dtype, device="cuda"))
    assert is_faster(impl, q, cache, table, out, None)
    assert not is_faster(impl, q, cache, table, out, 4)
    _, lse = decode(inputs, out=out[:, :, :heads], causal=causal, impl=impl)
    check(inputs, out[:, :, :heads], lse, causal=causal)
    assert count_poison(out) == len(lens) * q_len * 512
    again, again_lse = decode(inputs, causal=causal, impl=impl)
    assert torch.equal(again, out[:, :, :heads])
    assert torch.equal(again_lse, lse)
    named, _ = decode(inputs, causal=causal, num_splits=2, impl=impl)
    check(inputs, named, lse, causal=causal)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(inputs, causal=causal, impl=impl)
    seq_lens.copy_(seq_lens // 2)
    seq_lens[5] = table.shape[1] * 64 + 1
    graph.replay()
    torch.cuda.synchronize()
    assert out[5].isnan().all()
    assert lse[5].isnan().all()
    fine = torch.arange(len(lens), device="cuda") != 5
    check((q[fine], cache, table[fine], seq_lens[fine]), out[fine], lse[fine], causal=causal)


def test_what_it_is_taken_for() -> None:
    options = {"softmax_scale": SCALE}
    for heads, q_len in ((16, 1), (4, 8), (128, 1)):
        assert which_impl(mla_decode, *make_rows([300], q_len, heads), **options) == "hopper"
    assert which_impl(mla_decode, *make_rows([300], 1, 16, 8), **options) == "triton"
    q, *rest = make_rows([300], 1, 16)
    with pytest.raises(RuntimeError, match=r"needs bfloat16 over a cache with scales of its own, got torch\.float16"):
        mla_decode(q.half(), *rest, impl="hopper", **options)
