"""`mla_decode` on a GPU: the real kernels against float64."""

from typing import Any

import pytest
import torch

from mlakit.decode import mla_decode, mla_decode_reference
from mlakit.hardware import capability
from mlakit.testing import PagedCache, assert_close, compare_lse, count_poison, poison_, random_paged_cache

pytestmark = pytest.mark.gpu

SCALE = 192**-0.5
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make(
    lens: list[int],
    q_len: int,
    heads: int,
    *,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 512,
    rope: int = 64,
    spare_pages: int = 3,
) -> tuple[torch.Tensor, PagedCache]:
    generator = torch.Generator("cuda").manual_seed(sum(lens) + heads)
    paged = random_paged_cache(
        lens,
        (rank + rope,),
        page_size=page_size,
        dtype=dtype,
        device="cuda",
        generator=generator,
        spare_pages=spare_pages,
        dead_slot=2**30,  # to read through it is an illegal address
        loud=[q_len] * len(lens),
    )
    shape = (len(lens), q_len, heads, rank + rope)
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype), paged


def as_inputs(q: torch.Tensor, paged: PagedCache) -> Inputs:
    return q, paged.pages, paged.block_table, paged.seq_lens


def compact(inputs: Inputs) -> Inputs:
    """The same batch over a cache that holds only what the table reaches: a float64 copy of it is affordable."""
    q, cache, table, lens = inputs
    counts = [-(-n // cache.shape[1]) for n in lens.tolist()]
    live = torch.cat([table[i, :n] for i, n in enumerate(counts)]).long()
    compacted, start = torch.zeros_like(table), 0
    for i, n in enumerate(counts):
        compacted[i, :n] = torch.arange(start, start + n, device=table.device)
        start += n
    return q, cache[live], compacted, lens


def check(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, *, causal: bool = True, rank: int = 512) -> None:
    q, cache, table, lens = compact(inputs)
    options: dict[str, Any] = {"softmax_scale": SCALE, "causal": causal, "kv_lora_rank": rank}
    expected, expected_lse = mla_decode_reference(q.double(), cache.double(), table, lens, **options)
    eager, _ = mla_decode_reference(q, cache, table, lens, **options)
    assert_close(out, expected, eager)
    found = compare_lse(lse, expected_lse)
    assert found.ok, found.reason


def decode(inputs: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return mla_decode(*inputs, **{"softmax_scale": SCALE, "impl": "triton", **options})


# Lengths: empty, one key, around a tile and a page, a long request beside short ones (pieces from 1 to dozens). Heads:
# 1 and 3 (idle rows), 16 (few heads), 32, 65 (a second tile with one row), 128. New tokens: one, and more than some
# requests have keys.
LENS = [0, 1, 31, 32, 33, 63, 64, 65, 1000, 4097]


@pytest.mark.parametrize("heads", [1, 3, 16, 32, 65, 128])
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("num_splits", [None, 1, 7])
def test_against_float64(heads: int, q_len: int, num_splits: int | None) -> None:
    inputs = as_inputs(*make(LENS, q_len, heads))
    out = poison_(torch.empty((len(LENS), q_len, heads, 512), dtype=torch.bfloat16, device="cuda"))
    lse = poison_(torch.empty((len(LENS), q_len, heads), device="cuda"))
    result, logs = decode(inputs, out=out, lse=lse, num_splits=num_splits)
    assert result is out
    assert logs is lse
    assert count_poison(out) == count_poison(lse) == 0
    check(inputs, out, lse)


# A batch of one takes another way to its pieces: none, one, a few, and more than are merged at once.
@pytest.mark.parametrize("length", [0, 1, 65, 2000, 20_000])
@pytest.mark.parametrize("heads", [16, 32, 128])
def test_one_request(heads: int, length: int) -> None:
    inputs = as_inputs(*make([length], 1, heads))
    check(inputs, *decode(inputs))


# Pages below, at and above a tile; the largest holds a whole request. Each dtype meets a page below and one above.
@pytest.mark.parametrize(
    ("page_size", "dtype"),
    [(1, torch.bfloat16), (16, torch.float16), (128, torch.bfloat16), (4096, torch.float16)],
)
@pytest.mark.parametrize("heads", [8, 16, 128])
def test_page_sizes_and_dtypes(page_size: int, heads: int, dtype: torch.dtype) -> None:
    inputs = as_inputs(*make([777, 0, 64, 3001], 2, heads, page_size=page_size, dtype=dtype))
    check(inputs, *decode(inputs))


# The `tiny` preset, a rank that other models use, and one larger than DeepSeek's.
@pytest.mark.parametrize(("rank", "rope"), [(64, 16), (256, 64), (1024, 64)])
@pytest.mark.parametrize("heads", [4, 64])
def test_other_dimensions(rank: int, rope: int, heads: int) -> None:
    inputs = as_inputs(*make([500, 1, 90], 1, heads, rank=rank, rope=rope))
    check(inputs, *decode(inputs, kv_lora_rank=rank), rank=rank)


@pytest.mark.parametrize("heads", [16, 64])
def test_without_the_causal_mask(heads: int) -> None:
    inputs = as_inputs(*make([3, 200, 0], 4, heads))
    check(inputs, *decode(inputs, causal=False), causal=False)


# More requests than the GPU holds programs (no pieces), and about as many (pieces of several requests in one wave).
@pytest.mark.parametrize("batch", [40, 150, 600])
@pytest.mark.parametrize("heads", [16, 128])
def test_ragged_batches(batch: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    lens = torch.randint(0, 700, (batch,), generator=generator).tolist()
    lens[3] = 5000
    inputs = as_inputs(*make(lens, 1, heads))
    check(inputs, *decode(inputs))


# Every configuration the speed script sweeps, so that none is timed that is not right: 4 and 8 warps.
@pytest.mark.parametrize(
    "config",
    [
        (16, 32, 4, 3, 2),
        (16, 32, 4, 4, 1),
        (16, 64, 4, 2, 2),
        (16, 64, 4, 3, 1),
        (16, 64, 8, 3, 1),
        (32, 32, 4, 3, 2),
        (32, 64, 4, 3, 1),
        (32, 64, 8, 3, 1),
        (64, 32, 8, 4, 1),
        (64, 64, 8, 2, 1),
    ],
)
def test_every_configuration(config: tuple[int, int, int, int, int]) -> None:
    from mlakit.decode.triton_launch import DecodeConfig, _launch_decode

    if capability("cuda") != (9, 0):
        pytest.skip("these configurations are Hopper's")
    inputs = as_inputs(*make(LENS, 2, 16))
    out = poison_(torch.empty((len(LENS), 2, 16, 512), dtype=torch.bfloat16, device="cuda"))
    lse = poison_(torch.empty((len(LENS), 2, 16), device="cuda"))
    _launch_decode(
        *inputs,
        out,
        lse,
        softmax_scale=SCALE,
        causal=True,
        kv_lora_rank=512,
        num_splits=None,
        config=DecodeConfig(*config),
    )
    check(inputs, out, lse)


def test_cache_of_more_than_2_31_elements() -> None:
    # With 32-bit offsets the pages beyond 2^31 elements are read somewhere else; the live pages are shuffled over all.
    q, paged = make([5000, 3000], 1, 16, spare_pages=100_000)
    assert paged.pages.numel() > 2**31
    assert int(paged.block_table[0, :79].max()) * 64 * 576 > 2**31
    inputs = as_inputs(q, paged)
    for num_splits in (None, 1):
        check(inputs, *decode(inputs, num_splits=num_splits))


def test_page_size_one_in_a_cache_of_more_than_2_31_elements() -> None:
    inputs = as_inputs(*make([700, 300], 1, 128, page_size=1, spare_pages=6_000_000))
    assert inputs[1].numel() > 2**31
    check(inputs, *decode(inputs))


def test_a_request_longer_than_its_table_is_loud_and_spares_the_others() -> None:
    q, cache, table, lens = as_inputs(*make([640, 640], 1, 16))
    lens[0] = 641
    for num_splits in (None, 1):
        out, lse = decode((q, cache, table, lens), num_splits=num_splits)
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        assert out[1].isfinite().all()


@pytest.mark.parametrize("heads", [16, 128])
def test_cuda_graph_with_changing_lengths(heads: int) -> None:
    # One capture, replayed with other lengths and queries: no launch choice may depend on them, and the graph's
    # workspace must outlive allocations made between replays.
    lens = [3000, 64, 0, 900]
    q, paged = make(lens, 2, heads)
    inputs = as_inputs(q, paged)
    decode(inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(inputs)
    for new_lens in ([3000, 64, 0, 900], [1, 0, 0, 2], [2048, 33, 0, 700]):
        q.copy_(torch.randn_like(q))
        paged.seq_lens.copy_(torch.tensor(new_lens, dtype=torch.int32))
        poison_(out)
        poison_(lse)
        scratch = [poison_(torch.empty(2**22, device="cuda")) for _ in range(8)]
        graph.replay()
        torch.cuda.synchronize()
        del scratch
        check(inputs, out, lse)


def test_repeats_are_bitwise_equal_and_do_not_depend_on_the_batch_when_splits_are_given() -> None:
    q, cache, table, lens = as_inputs(*make([3000, 64, 0, 900], 1, 16))
    first, first_lse = decode((q, cache, table, lens), num_splits=8)
    again, again_lse = decode((q, cache, table, lens), num_splits=8)
    assert torch.equal(first, again)
    assert torch.equal(first_lse, again_lse)
    alone, alone_lse = decode((q[3:], cache, table[3:], lens[3:]), num_splits=8)
    assert torch.equal(first[3:], alone)
    assert torch.equal(first_lse[3:], alone_lse)


def test_changing_lengths_do_not_recompile() -> None:
    from mlakit.decode.triton_decode import _mla_decode_kernel

    def compiled() -> int:
        return sum(len(entry[0]) for entry in _mla_decode_kernel.device_caches.values())

    decode(as_inputs(*make([1000, 64, 500], 1, 128)))
    before = compiled()
    decode(as_inputs(*make([77, 6400, 3], 1, 128)))
    decode(as_inputs(*make([1, 0, 200], 1, 128)))
    assert before > 0
    assert compiled() == before


@pytest.mark.parametrize("heads", [16, 128])
def test_opcheck(heads: int) -> None:
    inputs = as_inputs(*make([300, 0, 65], 1, heads))
    options = (SCALE, True, 512, None, "triton")
    torch.library.opcheck(torch.ops.mlakit.mla_decode, (*inputs, *options))
    out = torch.empty((3, 1, heads, 512), dtype=torch.bfloat16, device="cuda")
    lse = torch.empty((3, 1, heads), device="cuda")
    torch.library.opcheck(torch.ops.mlakit.mla_decode_out, (*inputs, out, lse, *options))


def test_torch_compile_without_a_graph_break() -> None:
    inputs = as_inputs(*make([300, 0, 65], 1, 16))

    def layer(q: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = mla_decode(q * 2, *rest, softmax_scale=SCALE)
        return out + 1, lse

    expected = layer(*inputs)
    actual = torch.compile(layer, fullgraph=True)(*inputs)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_the_fastest_is_taken_unasked() -> None:
    inputs = as_inputs(*make([300, 65], 1, 16))
    chosen, _ = decode(inputs, impl=None)
    fastest = "hopper" if capability("cuda") == (9, 0) else "triton"
    assert torch.equal(chosen, decode(inputs, impl=fastest)[0])
    with pytest.raises(RuntimeError, match="needs bfloat16, float16 or float8_e4m3fn"):
        decode((inputs[0].float(), inputs[1].float(), *inputs[2:]))
