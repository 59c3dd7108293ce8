"""`mla_decode` with impl="hopper" on an H200: the Gluon kernels against float64."""

import dataclasses
from typing import Any

import pytest
import torch

from mlakit.decode import mla_decode, mla_decode_reference
from mlakit.decode.hopper_config import FEW16, FEW32, MANY, HopperConfig
from mlakit.hardware import capability
from mlakit.testing import PagedCache, assert_close, compare_lse, count_poison, poison_, random_paged_cache

pytestmark = pytest.mark.gpu

SCALE = 192**-0.5
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    if capability("cuda") != (9, 0):
        pytest.skip("these kernels are for compute capability 9.0")


def make(
    lens: list[int],
    q_len: int,
    heads: int,
    *,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    spare_pages: int = 3,
) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(sum(lens) + heads)
    paged: PagedCache = random_paged_cache(
        lens,
        (576,),
        page_size=page_size,
        dtype=dtype,
        device="cuda",
        generator=generator,
        spare_pages=spare_pages,
        dead_slot=2**30,  # to read through it is an illegal address
        loud=[q_len] * len(lens),
    )
    q = torch.randn((len(lens), q_len, heads, 576), generator=generator, device="cuda", dtype=dtype)
    return q, paged.pages, paged.block_table, paged.seq_lens


def check(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, *, causal: bool = True) -> None:
    q, cache, table, lens = inputs
    counts = [-(-n // cache.shape[1]) for n in lens.tolist()]
    live = torch.cat([table[i, :n] for i, n in enumerate(counts)]).long()
    compacted, start = torch.zeros_like(table), 0
    for i, n in enumerate(counts):
        compacted[i, :n] = torch.arange(start, start + n, device=table.device)
        start += n
    small = (cache[live], compacted, lens)  # a float64 copy of all of a large cache is not affordable
    expected, expected_lse = mla_decode_reference(
        q.double(), small[0].double(), *small[1:], softmax_scale=SCALE, causal=causal
    )
    eager, _ = mla_decode_reference(q, *small, softmax_scale=SCALE, causal=causal)
    assert_close(out, expected, eager)
    found = compare_lse(lse, expected_lse)
    assert found.ok, found.reason


def decode(inputs: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return mla_decode(*inputs, **{"softmax_scale": SCALE, "impl": "hopper", **options})


# Lengths: empty, one key, around a tile and a pair of tiles, a long request beside short ones. Heads: 1, 3 and 9 (idle
# rows of the kernel for few), 16 and 32 (its full ones), 63 to 128 (one and two tiles of the kernel for many, with idle
# rows). New tokens: one, and more than some requests have keys. Splits: shared by the device, none, and named.
LENS = [0, 1, 20, 63, 64, 65, 127, 128, 129, 140, 1000, 4096, 4097]


CASES = [
    (heads, q_len, causal, None)
    for heads in (1, 3, 9, 16, 32, 63, 64, 65, 126, 128)
    for q_len, causal in ((1, True), (2, True), (4, True), (4, False), (8, True))
] + [(heads, 1, True, splits) for heads in (9, 32, 128) for splits in (1, 5)]


@pytest.mark.parametrize(("heads", "q_len", "causal", "num_splits"), CASES)
def test_against_float64(heads: int, q_len: int, causal: bool, num_splits: int | None) -> None:
    inputs = make(LENS, q_len, heads)
    out = poison_(torch.empty((len(LENS), q_len, heads, 512), dtype=torch.bfloat16, device="cuda"))
    result, lse = decode(inputs, out=out, causal=causal, num_splits=num_splits)
    assert result is out
    assert count_poison(out) == 0
    check(inputs, out, lse, causal=causal)


# Pages of which a tile takes four and two, that hold one tile, several, and a whole request; in both dtypes.
@pytest.mark.parametrize(
    ("page_size", "dtype"),
    [
        (16, torch.bfloat16),
        (32, torch.float16),
        (64, torch.float16),
        (256, torch.bfloat16),
        (4096, torch.float16),
    ],
)
@pytest.mark.parametrize("heads", [16, 128])
def test_page_sizes_and_dtypes(page_size: int, heads: int, dtype: torch.dtype) -> None:
    inputs = make([777, 0, 64, 3001], 1, heads, page_size=page_size, dtype=dtype)
    check(inputs, *decode(inputs))


# One request over the whole GPU (a piece a slot: the merge of many), requests whose pieces are two, as many requests as
# slots, more of them, and lengths so ragged that requests share slots.
@pytest.mark.parametrize(
    "lens", [[8192], [131_072], [4096] * 32, [700] * 40, [1000] * 128, [300, 0, 77, 5000] * 30, list(range(0, 900, 3))]
)
@pytest.mark.parametrize("heads", [16, 128])
def test_batches(lens: list[int], heads: int) -> None:
    inputs = make(lens, 1, heads)
    first = decode(inputs)
    check(inputs, *first)
    for _ in range(3):  # bit for bit the same, whichever program comes first
        for again, before in zip(decode(inputs), first, strict=True):
            assert torch.equal(again, before)


# Every configuration the selector may take, on the rows of another: 16 heads by all of them.
@pytest.mark.parametrize("config", [FEW16, FEW32, MANY, dataclasses.replace(FEW16, resident=2, stages=1, least=3)])
def test_every_configuration(config: HopperConfig) -> None:
    from mlakit.decode.hopper_launch import _launch_hopper_decode

    inputs = make(LENS, 1, 16)
    out = poison_(torch.empty((len(LENS), 1, 16, 512), dtype=torch.bfloat16, device="cuda"))
    lse = poison_(torch.empty((len(LENS), 1, 16), device="cuda"))
    _launch_hopper_decode(*inputs, out, lse, softmax_scale=SCALE, causal=True, num_splits=None, config=config)
    check(inputs, out, lse)


@pytest.mark.parametrize("heads", [16, 128])
def test_cache_of_more_than_2_31_elements(heads: int) -> None:
    inputs = make([5000, 3000], 1, heads, spare_pages=100_000)
    assert inputs[1].numel() > 2**31
    assert int(inputs[2][0, :79].max()) * 64 * 576 > 2**31
    check(inputs, *decode(inputs))


@pytest.mark.parametrize("heads", [16, 128])
def test_a_request_longer_than_its_table_is_loud_and_spares_the_others(heads: int) -> None:
    q, cache, table, lens = make([640, 640, 0], 1, heads)
    lens[0] = 641
    out, lse = decode((q, cache, table, lens))
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert out[1].isfinite().all()
    assert (out[2] == 0).all()


@pytest.mark.parametrize("heads", [16, 128])
def test_strided_queries_and_outputs(heads: int) -> None:
    q, cache, table, lens = make([500, 1, 90], 2, heads)
    wide = torch.zeros((3, 2, heads, 600), dtype=q.dtype, device="cuda")
    wide[..., :576] = q
    out = poison_(torch.empty((3, heads, 2, 520), dtype=q.dtype, device="cuda")).transpose(1, 2)[..., :512]
    _, lse = decode((wide[..., :576], cache, table, lens), out=out)
    check((q, cache, table, lens), out, lse)


@pytest.mark.parametrize("heads", [16, 128])
def test_cuda_graph_with_changing_lengths(heads: int) -> None:
    # One capture, replayed with other lengths and queries: the schedule must follow them, and the counters by which
    # programs wait for one another must be zero again after every replay.
    q, cache, table, lens = make([3000, 64, 0, 900], 2, heads)
    inputs = (q, cache, table, lens)
    decode(inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(inputs)
    for new_lens in ([3000, 64, 0, 900], [1, 0, 0, 2], [2048, 33, 0, 700], [3000, 64, 0, 900]):
        q.copy_(torch.randn_like(q))
        lens.copy_(torch.tensor(new_lens, dtype=torch.int32))
        poison_(out)
        poison_(lse)
        scratch = [poison_(torch.empty(2**22, device="cuda")) for _ in range(8)]
        decode(inputs)  # an eager call in between has counters of its own
        graph.replay()
        torch.cuda.synchronize()
        del scratch
        check(inputs, out, lse)


def test_two_streams_at_once() -> None:
    inputs = [make([5000, 100, 3000], 1, 128), make([900, 4000], 1, 16)]
    expected = [decode(batch) for batch in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(decode(inputs[i]))
    torch.cuda.synchronize()
    for found, want in zip(results, expected, strict=True):
        for out, lse in found:
            assert torch.equal(out, want[0])
            assert torch.equal(lse, want[1])


def test_a_request_alone_is_the_same_where_splits_are_named() -> None:
    q, cache, table, lens = make([3000, 64, 0, 900], 1, 128)
    all_of_them = decode((q, cache, table, lens), num_splits=8)
    alone = decode((q[3:], cache, table[3:], lens[3:]), num_splits=8)
    assert torch.equal(all_of_them[0][3:], alone[0])
    assert torch.equal(all_of_them[1][3:], alone[1])


def test_changing_lengths_do_not_recompile() -> None:
    from mlakit.decode.hopper_many import _mla_decode_many_kernel

    def compiled() -> int:
        return sum(len(entry[0]) for entry in _mla_decode_many_kernel.device_caches.values())

    decode(make([1000, 64, 500], 1, 128))
    before = compiled()
    decode(make([77, 6400, 3], 1, 128))
    decode(make([1, 0, 200, 16], 1, 126))
    assert before > 0
    assert compiled() == before


@pytest.mark.parametrize("heads", [16, 128])
def test_opcheck(heads: int) -> None:
    inputs = make([300, 0, 65], 1, heads)
    torch.library.opcheck(torch.ops.mlakit.mla_decode, (*inputs, SCALE, True, 512, None, "hopper"))


def test_torch_compile_without_a_graph_break() -> None:
    inputs = make([300, 0, 65], 1, 128)

    def layer(q: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = mla_decode(q * 2, *rest, softmax_scale=SCALE, impl="hopper")
        return out + 1, lse

    expected = layer(*inputs)
    for got, want in zip(torch.compile(layer, fullgraph=True)(*inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("page_size", [1, 8])
def test_small_pages_are_refused_by_name_and_taken_unasked(page_size: int) -> None:
    inputs = make([300, 65], 1, 128, page_size=page_size)
    with pytest.raises(RuntimeError, match=f"page size that is a power of two and at least 16, got {page_size}"):
        decode(inputs)
    check(inputs, *decode(inputs, impl=None))
