"""`paged_attention` on a GPU: the real kernels against float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mlakit.hardware import capability
from mlakit.paged import paged_attention, paged_attention_reference
from mlakit.testing import assert_close, compare_lse, count_poison, poison_, random_page_table, random_pages

pytestmark = pytest.mark.gpu

SCALE = 0.09
Inputs = tuple[torch.Tensor, ...]


def make(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    spare_pages: int = 3,
    spare_tokens: int = 0,
) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(sum(kv_lens) + heads)
    table = random_page_table(
        kv_lens, page_size=page_size, device="cuda", generator=generator, spare_pages=spare_pages, dead_slot=2**30
    )  # to read through a dead slot is an illegal address
    shape = (kv_heads, head_dim)
    k = random_pages(table, shape, dtype=dtype, generator=generator, loud=q_lens)
    v = random_pages(table, shape, dtype=dtype, generator=generator)
    bounds = torch.tensor([0, *q_lens], device="cuda").cumsum(0).int()
    tokens = sum(q_lens) + spare_tokens
    q = torch.randn((tokens, heads, head_dim), generator=generator, device="cuda", dtype=dtype)
    q[sum(q_lens) :] = torch.nan
    return q, k, v, table.block_table, table.seq_lens, bounds


def compact(inputs: Inputs) -> Inputs:
    """The same batch over caches that hold only what the table reaches: float64 copies of them are affordable."""
    q, k, v, table, lens, bounds = inputs
    counts = [-(-n // k.shape[1]) for n in lens.tolist()]
    live = torch.cat([table[i, :n] for i, n in enumerate(counts)]).long()
    compacted, start = torch.zeros_like(table), 0
    for i, n in enumerate(counts):
        compacted[i, :n] = torch.arange(start, start + n, device=table.device)
        start += n
    return q, k[live], v[live], compacted, lens, bounds


def check(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, causal: bool = True) -> None:
    q, k, v, *tables = compact(inputs)
    options: dict[str, Any] = {"softmax_scale": SCALE, "causal": causal}
    expected, expected_lse = paged_attention_reference(q.double(), k.double(), v.double(), *tables, **options)
    eager, _ = paged_attention_reference(q, k, v, *tables, **options)
    assert_close(out, expected, eager)
    found = compare_lse(lse, expected_lse)
    assert found.ok, found.reason


def attend(inputs: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_attention(*inputs, **{"softmax_scale": SCALE, "impl": "triton", **options})


# Lengths: empty, one key, around a tile and a page, a long request beside short ones (pieces from 1 to dozens).
KV_LENS = [0, 1, 15, 16, 17, 63, 64, 65, 1000, 4097]


# Groups: 1 (idle rows), 3, 4, 16 (a tile of one token), 32 (a larger tile). New tokens: one, and more than some of the
# requests have keys. Without a hint of their number both kernels run.
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (6, 2), (32, 8), (32, 2), (32, 1)])
@pytest.mark.parametrize(
    ("q_len", "num_splits", "hint"), [(1, None, 1), (1, 1, 1), (1, 7, None), (5, None, 9), (5, 7, 5)]
)
def test_decode(heads: int, kv_heads: int, q_len: int, num_splits: int | None, hint: int | None) -> None:
    inputs = make([q_len] * len(KV_LENS), KV_LENS, heads=heads, kv_heads=kv_heads, spare_tokens=3)
    out = poison_(torch.empty_like(inputs[0]))
    result, lse = attend(inputs, out=out, num_splits=num_splits, max_seqlen_q=hint)
    assert result is out
    assert count_poison(out) == 0
    check(inputs, out, lse)


# Prefill, a chunk of a longer prompt, decode and requests without tokens or keys, in any order; lengths around a tile
# of rows. One request alone; and few rows over many keys, which are cut.
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([500, 1, 0, 130, 1, 4, 5, 16, 17], [500, 3000, 70, 777, 0, 300, 6, 16, 2000]),
        ([1, 127, 128, 129], [9, 127, 500, 129]),
        ([33, 31, 32], [33, 31, 32]),
        ([1025], [1025]),
        ([40], [9000]),
        ([300], [100]),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads", "causal"), [(32, 8, True), (32, 8, False), (5, 5, True), (10, 2, False)])
def test_mixtures(q_lens: list[int], kv_lens: list[int], heads: int, kv_heads: int, causal: bool) -> None:
    inputs = make(q_lens, kv_lens, heads=heads, kv_heads=kv_heads, spare_tokens=2)
    for hint in (max(q_lens), None):
        out = poison_(torch.empty_like(inputs[0]))
        _, lse = attend(inputs, causal=causal, max_seqlen_q=hint, out=out)
        assert count_poison(out) == 0
        check(inputs, out, lse, causal)


# Dims that are powers of two and not; pages below, at and above a tile, and one that no tile divides; both dtypes.
@pytest.mark.parametrize(
    ("head_dim", "page_size", "dtype"),
    [
        (16, 16, torch.bfloat16),
        (40, 64, torch.float16),
        (64, 1, torch.bfloat16),
        (64, 256, torch.float16),
        (80, 48, torch.bfloat16),
        (96, 16, torch.float16),
        (128, 64, torch.bfloat16),
        (128, 1, torch.float16),
        (192, 16, torch.bfloat16),
        (256, 48, torch.float16),
        (256, 128, torch.bfloat16),
    ],
)
def test_dims_and_pages(head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    inputs = make([200, 1, 3, 1], [777, 2000, 64, 0], head_dim=head_dim, page_size=page_size, dtype=dtype)
    check(inputs, *attend(inputs, max_seqlen_q=200))


# Enough rows for Hopper's larger tiles, and decode beside them; a cache beyond 2^31 elements too.
@pytest.mark.parametrize(
    ("head_dim", "page_size", "spare_pages"), [(128, 16, 3), (128, 64, 3), (64, 16, 3), (96, 1, 3), (128, 16, 140_000)]
)
def test_large_tiles(head_dim: int, page_size: int, spare_pages: int) -> None:
    inputs = make(
        [700, 1, 1300, 3], [700, 900, 2000, 77], head_dim=head_dim, page_size=page_size, spare_pages=spare_pages
    )
    check(inputs, *attend(inputs, max_seqlen_q=1300))


# More requests than the GPU holds programs, and about as many (pieces of several requests in one wave).
@pytest.mark.parametrize("batch", [1, 40, 150, 600])
def test_ragged_batches(batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    kv_lens = torch.randint(0, 700, (batch,), generator=generator).tolist()
    kv_lens[0] = 20_000
    inputs = make([1] * batch, kv_lens)
    check(inputs, *attend(inputs, max_seqlen_q=1))


def test_keys_and_values_in_one_tensor() -> None:
    inputs = make([300, 1, 2], [400, 900, 77])
    q, k, v, *tables = inputs
    both = torch.stack([k, v], dim=1)
    alone = attend(inputs, max_seqlen_q=300)
    together = attend((q, both[:, 0], both[:, 1], *tables), max_seqlen_q=300)
    heads_first = attend((q, k, v.transpose(1, 2).contiguous().transpose(1, 2), *tables), max_seqlen_q=300)
    for got in (together, heads_first):
        assert torch.equal(got[0], alone[0])
        assert torch.equal(got[1], alone[1])


# With 32-bit offsets the pages beyond 2^31 elements are read somewhere else; the live pages are shuffled over all.
@pytest.mark.parametrize(
    ("q_len", "page_size", "spare_pages"), [(1, 16, 140_000), (300, 16, 140_000), (1, 128, 30_000)]
)
def test_caches_of_more_than_2_31_elements(q_len: int, page_size: int, spare_pages: int) -> None:
    inputs = make([q_len, 1], [5000, 3000], page_size=page_size, spare_pages=spare_pages)
    assert inputs[1].numel() > 2**31
    assert int(inputs[3][0, : 3000 // page_size].max()) * page_size * 1024 > 2**31
    check(inputs, *attend(inputs, max_seqlen_q=q_len))


def test_broken_promises_are_loud_and_spare_the_others() -> None:
    q, k, v, table, lens, bounds = make([1, 1, 200], [640, 640, 640])
    lens[0] = 641
    for hint, splits in ((200, None), (200, 4), (None, None)):
        out, lse = attend((q, k, v, table, lens, bounds), max_seqlen_q=hint, num_splits=splits)
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        assert out[1:].isfinite().all()
    out, _ = attend((q, k, v, table, lens, bounds), max_seqlen_q=1)  # of 200 tokens
    assert out[2:].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("longest", [1, 300])
def test_cuda_graph_with_changing_lengths(longest: int) -> None:
    # One capture, replayed with other lengths, queries and bounds: no launch choice may depend on them, and the graph's
    # workspace must outlive allocations made between replays.
    inputs = make([longest, 1, 1, 0], [3000, 64, 0, 900], spare_tokens=2)
    q, _, _, _, lens, bounds = inputs
    attend(inputs, max_seqlen_q=longest)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(inputs, max_seqlen_q=longest)
    for q_lens, kv_lens in (
        ([longest, 1, 1, 0], [3000, 64, 0, 900]),
        ([1, 1, 0, 1], [1, 0, 0, 2]),
        ([1] * 4, [2048, 33, 0, 7]),
    ):
        q.copy_(torch.randn_like(q))
        lens.copy_(torch.tensor(kv_lens, dtype=torch.int32))
        bounds[1:].copy_(torch.tensor(q_lens).cumsum(0))
        poison_(out)
        poison_(lse)
        scratch = [poison_(torch.empty(2**22, device="cuda")) for _ in range(8)]
        graph.replay()
        torch.cuda.synchronize()
        del scratch
        check(inputs, out, lse)


def test_repeats_are_bitwise_equal_and_do_not_depend_on_the_batch_when_splits_are_given() -> None:
    inputs = make([1, 1, 200, 1], [3000, 64, 300, 900])
    q, k, v, table, lens, bounds = inputs
    for splits in (None, 8):
        first = attend(inputs, max_seqlen_q=200, num_splits=splits)
        again = attend(inputs, max_seqlen_q=200, num_splits=splits)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    others = lens.clone()
    others[0] = 77
    changed = attend((q, k, v, table, others, bounds), max_seqlen_q=200, num_splits=8)
    assert torch.equal(first[0][1:], changed[0][1:])
    assert torch.equal(first[1][1:], changed[1][1:])


def test_changing_lengths_do_not_recompile() -> None:
    from mlakit.paged.triton_split import _paged_split_kernel
    from mlakit.paged.triton_tiles import _paged_tiles_kernel

    def compiled() -> int:
        kernels = (_paged_split_kernel, _paged_tiles_kernel)
        return sum(len(entry[0]) for kernel in kernels for entry in kernel.device_caches.values())

    attend(make([200, 1, 1], [1000, 64, 500]), max_seqlen_q=200)
    attend(make([80], [3000]), max_seqlen_q=80)  # few rows over many keys
    before = compiled()
    attend(make([99], [4000]), max_seqlen_q=99)
    attend(make([1, 300, 5], [77, 6400, 30]), max_seqlen_q=300)
    attend(make([1, 100, 400, 7], [1, 100, 400, 7]), max_seqlen_q=450)
    assert before > 0
    assert compiled() == before


def test_opcheck() -> None:
    inputs = make([1, 30, 1], [300, 30, 65])
    options = (SCALE, True, 30, None, "triton")
    torch.library.opcheck(torch.ops.mlakit.paged_attention, (*inputs, *options))
    torch.library.opcheck(torch.ops.mlakit.paged_attention_out, (*inputs, torch.empty_like(inputs[0]), *options))


def test_torch_compile_without_a_graph_break() -> None:
    inputs = make([1, 30, 1], [300, 30, 65])

    def layer(q: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = paged_attention(q * 2, *rest, softmax_scale=SCALE, max_seqlen_q=30)
        return out + 1, lse

    expected = layer(*inputs)
    actual = torch.compile(layer, fullgraph=True)(*inputs)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_the_kernel_is_taken_unasked() -> None:
    inputs = make([1, 30], [300, 65])
    assert capability("cuda") is not None
    assert torch.equal(attend(inputs, impl=None)[0], attend(inputs)[0])
    with pytest.raises(RuntimeError, match=r"needs bfloat16 or float16, got torch\.float32"):
        attend((*(x.float() for x in inputs[:3]), *inputs[3:]))
