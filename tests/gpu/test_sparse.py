"""`mla_sparse_prefill` and `mla_sparse_decode` on a GPU: the real kernels against float64."""

from typing import Any

import pytest
import torch

from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.hardware import capability
from mlakit.sparse import (
    mla_sparse_decode,
    mla_sparse_decode_reference,
    mla_sparse_prefill,
    mla_sparse_prefill_reference,
)
from mlakit.sparse.config import SparseConfig
from mlakit.sparse.hopper_config import HopperConfig
from mlakit.testing import assert_close, compare_lse, count_poison, poison_

pytestmark = pytest.mark.gpu

Tensors = tuple[torch.Tensor, ...]
WILD = (-1, -(2**31), 2147480000, 2**31 - 1)  # indices that are ignored


def need_hopper() -> None:
    if capability("cuda") != (9, 0):
        pytest.skip("the Gluon kernel is Hopper's")


@pytest.fixture(params=["triton", "hopper"])
def impl(request: pytest.FixtureRequest) -> str:
    """Both kernels, where the inputs are such as both take."""
    if request.param == "hopper":
        need_hopper()
    return str(request.param)


def random_indices(shape: tuple[int, ...], keys: int, generator: torch.Generator, invalid: float = 0.2) -> torch.Tensor:
    """Indices [..., topk] with duplicates and some of them invalid, anywhere; the second row is wholly invalid."""
    indices = torch.randint(0, keys, shape, generator=generator, device="cuda")
    bad = torch.rand(shape, generator=generator, device="cuda") < invalid
    if invalid and shape[0] > 1:
        bad[1] = True
    wild = torch.tensor([*WILD, keys], device="cuda")
    some = wild[torch.randint(0, len(WILD) + 1, shape, generator=generator, device="cuda")]
    return torch.where(bad, some, indices).int()


def poison_unnamed_(rows: torch.Tensor, indices: torch.Tensor) -> None:
    """NaN in every row that no index names."""
    named = torch.zeros(len(rows), dtype=torch.bool, device="cuda")
    flat = indices.flatten().long()
    named[flat[(flat >= 0) & (flat < len(rows))]] = True
    rows[~named] = 255 if rows.dtype == torch.uint8 else torch.nan


def make_prefill(
    s_q: int, s_kv: int, topk: int, heads: int, *, kv_heads: int = 1, rope: int = 64, rank: int = 512,
    dtype: torch.dtype = torch.bfloat16, invalid: float = 0.2,
) -> Tensors:  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(s_kv + topk + heads)
    indices = random_indices((s_q, kv_heads, topk), s_kv, generator, invalid)
    kv = torch.randn((s_kv, kv_heads, rank + rope), generator=generator, device="cuda").to(dtype)
    for head in range(kv_heads):
        poison_unnamed_(kv[:, head], indices[:, head])
    q = torch.randn((s_q, heads, rank + rope), generator=generator, device="cuda").to(dtype)
    return q, kv, indices


def prefill(inputs: Tensors, **options: Any) -> Tensors:
    d_v = options.pop("d_v", 512)
    scale = inputs[0].shape[-1] ** -0.5
    return mla_sparse_prefill(*inputs, **{"softmax_scale": scale, "d_v": d_v, "impl": "triton", **options})


def check_prefill(inputs: Tensors, found: Tensors, **options: Any) -> None:
    q, kv, indices = inputs
    options = {"softmax_scale": q.shape[-1] ** -0.5, **options}
    exact = mla_sparse_prefill_reference(q.double(), kv.double(), indices, **options)
    eager = mla_sparse_prefill_reference(q, kv, indices, **options)
    assert_close(found[0], exact[0], eager[0])
    for actual, expected in zip(found[1:], exact[1:], strict=True):
        compared = compare_lse(actual, expected)
        assert compared.ok, compared.reason


def make_decode(
    batch: int, q_len: int, topk: int, heads: int, *, fp8: bool, pages: int = 100, page_size: int = 64,
    rank: int = 512, rope: int = 64, dtype: torch.dtype = torch.bfloat16, invalid: float = 0.2,
) -> Tensors:  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(batch + topk + heads)
    slots = pages * page_size
    indices = random_indices((batch, q_len, topk), slots, generator, invalid)
    keys = torch.randn((slots, rank + rope), generator=generator, device="cuda")
    rows = pack_fp8(keys[:, :rank], keys[:, rank:]) if fp8 else keys.to(dtype)
    poison_unnamed_(rows, indices)
    q = torch.randn((batch, q_len, heads, rank + rope), generator=generator, device="cuda").to(dtype)
    return q, rows.view(pages, page_size, -1), indices


def decode(inputs: Tensors, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scale = inputs[0].shape[-1] ** -0.5
    return mla_sparse_decode(*inputs, **{"softmax_scale": scale, "impl": "triton", **options})


def check_decode(inputs: Tensors, out: torch.Tensor, lse: torch.Tensor, **options: Any) -> None:
    q, cache, indices = inputs
    options = {"softmax_scale": q.shape[-1] ** -0.5, **options}
    fp8 = cache.dtype == torch.uint8
    keys = unpack_fp8(cache, out.shape[-1], q.dtype) if fp8 else cache  # as a kernel may round them
    exact, exact_lse = mla_sparse_decode_reference(q.double(), cache if fp8 else keys.double(), indices, **options)
    _, rounded_lse = mla_sparse_decode_reference(q.double(), keys.double(), indices, **options)
    eager, _ = mla_sparse_decode_reference(q, keys, indices, **options)
    assert_close(out, exact, eager)
    compared = compare_lse(lse, exact_lse, rounded_lse)
    assert compared.ok, compared.reason


# topk: one, around a step of keys, DeepSeek's; fewer keys than that. Heads: 1 and 3 (idle rows), 16 (few), 32, 33 and
# 65 (a tile with idle rows, a second one with a single row), 128.
@pytest.mark.parametrize("heads", [1, 3, 16, 32, 33, 65, 128])
@pytest.mark.parametrize(("s_kv", "topk"), [(3000, 1), (3000, 127), (3000, 128), (3000, 2048), (5, 130), (1, 2048)])
def test_prefill_against_float64(heads: int, s_kv: int, topk: int, impl: str) -> None:
    inputs = make_prefill(5, s_kv, topk, heads)
    out = poison_(torch.empty((5, heads, 512), dtype=torch.bfloat16, device="cuda"))
    found = prefill(inputs, out=out, impl=impl)
    assert found[0] is out
    assert count_poison(out) == 0
    assert bool((found[2][1] == -torch.inf).all())  # the row that is wholly invalid
    assert bool((out[1] == 0).all())
    check_prefill(inputs, found)


# No rope part (512/512), float16, and both with every option. A sink of either infinity is handled as a number.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rope", [0, 64])
@pytest.mark.parametrize("heads", [16, 64])
def test_prefill_options(dtype: torch.dtype, rope: int, heads: int, impl: str) -> None:
    inputs = make_prefill(7, 900, 300, heads, rope=rope, dtype=dtype)
    sink = torch.randn(heads, device="cuda")
    sink[0], sink[1] = torch.inf, -torch.inf
    lengths = torch.tensor([300, 299, 0, 1, 64, -5, 1000], dtype=torch.int32, device="cuda")
    options = {"attn_sink": sink, "topk_length": lengths}
    check_prefill(inputs, prefill(inputs, impl=impl, **options), **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 2), (128, 2), (12, 4), (8, 8)])
def test_prefill_with_several_key_heads(heads: int, kv_heads: int, impl: str) -> None:
    inputs = make_prefill(4, 500, 200, heads, kv_heads=kv_heads)
    check_prefill(inputs, prefill(inputs, impl=impl))


@pytest.mark.parametrize(("rank", "rope"), [(64, 16), (256, 64), (1024, 64)])
@pytest.mark.parametrize("heads", [4, 64])
def test_prefill_of_other_dimensions(rank: int, rope: int, heads: int) -> None:
    inputs = make_prefill(4, 500, 200, heads, rank=rank, rope=rope)
    check_prefill(inputs, prefill(inputs, d_v=rank), d_v=rank)


def test_prefill_without_keys_or_indices_or_tokens() -> None:
    for s_q, s_kv, topk in ((3, 0, 64), (3, 10, 0), (0, 10, 64)):
        q = torch.randn((s_q, 128, 576), device="cuda", dtype=torch.bfloat16)
        kv = torch.randn((s_kv, 1, 576), device="cuda", dtype=torch.bfloat16)
        out, max_logits, lse = prefill((q, kv, torch.zeros((s_q, 1, topk), dtype=torch.int32, device="cuda")))
        assert bool((out == 0).all())
        assert bool((max_logits == -torch.inf).all())
        assert bool((lse == -torch.inf).all())


# Large enough that copies are in flight while others are multiplied, on every multiprocessor: what a race would spoil.
# All indices valid (steps without masks, and at topk 1000 a last one with), and some not.
@pytest.mark.parametrize("rope", [0, 64])
@pytest.mark.parametrize(("topk", "invalid"), [(1000, 0.2), (1000, 0.0), (1024, 0.0), (64, 0.0)])
def test_many_tokens(rope: int, topk: int, invalid: float, impl: str) -> None:
    q, kv, indices = make_prefill(600, 20000, topk, 128, rope=rope, invalid=invalid)
    found = prefill((q, kv, indices), impl=impl)
    some = torch.arange(0, 600, 13, device="cuda")
    check_prefill((q[some], kv, indices[some]), tuple(x[some] for x in found))
    again = prefill((q, kv, indices), impl=impl)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("topk", "invalid"), [(1000, 0.2), (1000, 0.0), (1024, 0.0)])
def test_many_requests(fp8: bool, topk: int, invalid: float, impl: str) -> None:
    q, cache, indices = make_decode(300, 1, topk, 128, fp8=fp8, pages=1000, invalid=invalid)
    out, lse = decode((q, cache, indices), impl=impl)
    some = torch.arange(0, 300, 13, device="cuda")
    check_decode((q[some], cache, indices[some]), out[some], lse[some])
    again = decode((q, cache, indices), impl=impl)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


# What a context shorter than topk looks like: valid indices, then none; the valid ones end at a step, in one, at once.
@pytest.mark.parametrize("heads", [16, 128])
def test_valid_indices_first(heads: int, impl: str) -> None:
    q, kv, indices = make_prefill(6, 3000, 700, heads, invalid=0.0)
    for token, count in enumerate((700, 128, 127, 129, 1, 0)):
        indices[token, :, count:] = -1
    check_prefill((q, kv, indices), prefill((q, kv, indices), impl=impl))
    indices[2, :, 300] = 2147480000
    indices[3, :, 0] = -1
    check_prefill((q, kv, indices), prefill((q, kv, indices), impl=impl))


CONFIGS = [
    SparseConfig(64, 64, 8, 3, wgmma=True), SparseConfig(64, 64, 8, 2, wgmma=True), SparseConfig(64, 64, 8, 2),
    SparseConfig(64, 32, 8, 3), SparseConfig(64, 32, 8, 4), SparseConfig(32, 64, 8, 3), SparseConfig(16, 32, 4, 3, 2),
    SparseConfig(32, 32, 8, 3), SparseConfig(16, 32, 8, 3), SparseConfig(16, 64, 8, 2), SparseConfig(32, 32, 8, 2, 2),
    SparseConfig(64, 32, 8, 3, wgmma=True),
]  # fmt: skip


# Every configuration that the speed script sweeps, so that none is timed that is not right.
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_every_configuration(config: SparseConfig, fp8: bool) -> None:
    from mlakit.sparse.triton_launch import _launch_decode

    if capability("cuda") != (9, 0):
        pytest.skip("these configurations are Hopper's")
    inputs = make_decode(40, 1, 700, 70, fp8=fp8)
    for splits in (1, 3):
        out = poison_(torch.empty((40, 1, 70, 512), dtype=torch.bfloat16, device="cuda"))
        lse = poison_(torch.empty((40, 1, 70), device="cuda"))
        scale = 576**-0.5
        q, cache, indices = inputs
        _launch_decode(q, cache, indices, None, None, out, lse, softmax_scale=scale, num_splits=splits, config=config)
        assert count_poison(out) == 0
        check_decode(inputs, out, lse)


HOPPER = [HopperConfig(216, 72, 1), HopperConfig(216, 72, 2), HopperConfig(208, 88, 2)]
HOPPER_FP8 = [HopperConfig(200, 104, 1), HopperConfig(208, 88, 1), HopperConfig(192, 120, 1)]


# On every multiprocessor, several tokens each, three times the same bits: what a race would spoil.
@pytest.mark.parametrize("rope", [0, 64])
@pytest.mark.parametrize("config", HOPPER, ids=str)
def test_every_hopper_configuration(config: HopperConfig, rope: int) -> None:
    from mlakit.sparse.hopper_launch import _launch_hopper

    need_hopper()
    q, kv, indices = make_prefill(300, 20000, 1000, 128, rope=rope)
    results = []
    for _ in range(3):
        out = poison_(torch.empty((300, 128, 512), dtype=q.dtype, device="cuda"))
        max_logits, lse = (
            poison_(torch.empty((300, 128), device="cuda")),
            poison_(torch.empty((300, 128), device="cuda")),
        )
        scale = q.shape[-1] ** -0.5
        _launch_hopper(
            q, kv, indices, None, None, out, max_logits, lse, softmax_scale=scale, num_splits=1, config=config
        )  # fmt: skip
        results.append((out, max_logits, lse))
    some = torch.arange(0, 300, 11, device="cuda")
    check_prefill((q[some], kv, indices[some]), tuple(x[some] for x in results[0]))
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("fp8", "config"), [*((False, x) for x in HOPPER), *((True, x) for x in HOPPER_FP8)], ids=str)
def test_every_hopper_configuration_of_decode(fp8: bool, config: HopperConfig, num_splits: int) -> None:
    from mlakit.sparse.hopper_launch import _launch_hopper

    need_hopper()
    q, cache, indices = make_decode(300, 1, 1000, 128, fp8=fp8, pages=1000)
    results = []
    for _ in range(3):
        out = poison_(torch.empty((300, 1, 128, 512), dtype=q.dtype, device="cuda"))
        lse = poison_(torch.empty((300, 1, 128), device="cuda"))
        scale = 576**-0.5
        _launch_hopper(
            q, cache, indices, None, None, out, None, lse, softmax_scale=scale, num_splits=num_splits, config=config
        )  # fmt: skip
        results.append((out, lse))
    some = torch.arange(0, 300, 11, device="cuda")
    check_decode((q[some], cache, indices[some]), *(x[some] for x in results[0]))
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("heads", [1, 16, 65, 128])
@pytest.mark.parametrize(("batch", "q_len", "topk"), [(1, 1, 2048), (3, 2, 127), (2, 1, 1), (150, 1, 300)])
@pytest.mark.parametrize("num_splits", [None, 1, 7])
def test_decode_against_float64(
    fp8: bool, heads: int, batch: int, q_len: int, topk: int, num_splits: int | None, impl: str
) -> None:
    inputs = make_decode(batch, q_len, topk, heads, fp8=fp8)
    out = poison_(torch.empty((batch, q_len, heads, 512), dtype=torch.bfloat16, device="cuda"))
    result, lse = decode(inputs, out=out, num_splits=num_splits, impl=impl)
    assert result is out
    assert count_poison(out) == 0
    check_decode(inputs, out, lse)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("impl", "page_size"), [("triton", 1), ("triton", 48), ("hopper", 48)])
@pytest.mark.parametrize("num_splits", [None, 1])
def test_decode_options(fp8: bool, page_size: int, num_splits: int | None, impl: str) -> None:
    if impl == "hopper":
        need_hopper()
    # Of the float8 cache the Gluon kernel takes bfloat16 queries alone.
    dtype = torch.bfloat16 if fp8 and impl == "hopper" else torch.float16
    q, cache, indices = make_decode(4, 2, 300, 32, fp8=fp8, page_size=page_size, dtype=dtype)
    wide = torch.zeros((*cache.shape[:2], 2, cache.shape[2]), dtype=cache.dtype, device="cuda")
    wide[:, :, 1] = cache  # tokens that do not follow one another
    pages = torch.cat([wide, wide], 1)[:, :page_size, 1]  # nor do pages
    sink = torch.randn(32, device="cuda")
    sink[0], sink[1] = torch.inf, -torch.inf
    for lengths in ([300, 0, 17, 1000], [[300, 1], [0, -3], [17, 200], [1000, 33]]):
        options = {"attn_sink": sink, "topk_length": torch.tensor(lengths, dtype=torch.int32, device="cuda")}
        inputs = (q, pages, indices)
        check_decode(inputs, *decode(inputs, num_splits=num_splits, impl=impl, **options), **options)


# The Gluon kernel computes in float16: keys, a key's groups of 128 columns, and heads of very different magnitude.
def test_float8_of_very_different_magnitudes(impl: str) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    q, cache, indices = make_decode(9, 1, 300, 64, fp8=True)
    named = cache.flatten(0, 1)[:, 0] != 255
    keys = torch.randn((6400, 576), generator=generator, device="cuda")
    keys *= torch.exp2(torch.randint(-12, 1, (6400, 1), generator=generator, device="cuda").float())
    keys[:, 128:256] *= 2.0**-9
    rows = pack_fp8(keys[:, :512], keys[:, 512:])
    rows[~named] = 255
    q = q * torch.exp2(torch.randint(-14, 1, (9, 1, 64, 1), generator=generator, device="cuda").float()).to(q.dtype)
    inputs = (q, rows.view(cache.shape), indices)
    check_decode(inputs, *decode(inputs, impl=impl))


@pytest.mark.parametrize("rank", [128, 256])
@pytest.mark.parametrize("fp8", [False, True])
def test_decode_of_other_dimensions(rank: int, fp8: bool) -> None:
    for heads in (16, 64):
        inputs = make_decode(3, 1, 200, heads, fp8=fp8, rank=rank)
        check_decode(inputs, *decode(inputs, kv_lora_rank=rank), kv_lora_rank=rank)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("heads", [16, 128])
def test_cache_of_more_than_2_31_elements(fp8: bool, heads: int, impl: str) -> None:
    # With 32-bit offsets what lies beyond 2^31 elements is read somewhere else.
    width = 656 if fp8 else 576
    pages = 2**31 // (64 * width) + 200
    cache = torch.zeros((pages, 64, width), dtype=torch.uint8 if fp8 else torch.bfloat16, device="cuda")
    q, small, indices = make_decode(3, 1, 500, heads, fp8=fp8)
    cache[-len(small) :] = small
    shift = (pages - len(small)) * 64
    far = torch.where((indices >= 0) & (indices < 6400), indices + shift, -1)
    found = decode((q, cache, far), impl=impl)
    check_decode((q, small, indices), *found)
    if not fp8:
        flat = cache.view(-1, 1, width)
        out, _, lse = prefill((q[:, 0], flat, far), impl=impl)
        check_decode((q, small, indices), out[:, None], lse[:, None])


@pytest.mark.parametrize("heads", [16, 128])
def test_cuda_graph_with_changing_indices_and_lengths(heads: int, impl: str) -> None:
    # One capture, replayed with other numbers: no launch choice may depend on them, and the graph's workspace must
    # outlive allocations made between replays.
    q, cache, indices = make_decode(4, 1, 500, heads, fp8=True)
    pq, kv, some = make_prefill(5, 800, 300, heads)
    lengths = torch.full((4,), 500, dtype=torch.int32, device="cuda")
    decode((q, cache, indices), topk_length=lengths, impl=impl)  # compiles
    prefill((pq, kv, some), impl=impl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode((q, cache, indices), topk_length=lengths, impl=impl)
        found = prefill((pq, kv, some), impl=impl)
    for new in ([500, 64, 0, 1], [3, 500, 500, 77]):
        q.copy_(torch.randn_like(q))
        indices.copy_(indices.flip(-1).roll(1, 0))
        some.copy_(some.flip(-1))
        lengths.copy_(torch.tensor(new, dtype=torch.int32))
        for x in (out, lse, *found):
            poison_(x)
        scratch = [poison_(torch.empty(2**22, device="cuda")) for _ in range(8)]
        graph.replay()
        torch.cuda.synchronize()
        del scratch
        check_decode((q, cache, indices), out, lse, topk_length=lengths)
        check_prefill((pq, kv, some), found)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_token_does_not_depend_on_the_batch_when_splits_are_given(fp8: bool, impl: str) -> None:
    q, cache, indices = make_decode(5, 1, 700, 128, fp8=fp8)
    first, first_lse = decode((q, cache, indices), num_splits=4, impl=impl)
    again, again_lse = decode((q, cache, indices), num_splits=4, impl=impl)
    assert torch.equal(first, again)
    assert torch.equal(first_lse, again_lse)
    alone, alone_lse = decode((q[3:4], cache, indices[3:4]), num_splits=4, impl=impl)
    assert torch.equal(first[3:4], alone)
    assert torch.equal(first_lse[3:4], alone_lse)


def test_other_lengths_do_not_recompile(impl: str) -> None:
    from mlakit.sparse.hopper_attention import _mla_sparse_hopper_kernel
    from mlakit.sparse.triton_attention import _mla_sparse_kernel

    kernel = _mla_sparse_hopper_kernel if impl == "hopper" else _mla_sparse_kernel

    def compiled() -> int:
        return sum(len(entry[0]) for entry in kernel.device_caches.values())

    prefill(make_prefill(5, 1000, 300, 128), impl=impl)
    before = compiled()
    prefill(make_prefill(9, 64, 77, 128), impl=impl)
    prefill(make_prefill(1, 20001, 2048, 128), impl=impl)
    assert before > 0
    assert compiled() == before


@pytest.mark.parametrize("heads", [16, 128])
def test_opcheck(heads: int, impl: str) -> None:
    q, kv, indices = make_prefill(3, 90, 70, heads)
    sink = torch.randn(heads, device="cuda")
    options = (0.05, 512, sink, None, impl)
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_prefill, (q, kv, indices, *options))
    out = torch.empty((3, heads, 512), dtype=q.dtype, device="cuda")
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_prefill_out, (q, kv, indices, out, *options))
    inputs = make_decode(3, 1, 70, heads, fp8=True)
    lengths = torch.tensor([3, 70, 0], dtype=torch.int32, device="cuda")
    rest = (0.05, 512, None, lengths, None, impl)
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_decode, (*inputs, *rest))
    out = torch.empty((3, 1, heads, 512), dtype=q.dtype, device="cuda")
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_decode_out, (*inputs, out, *rest))


def test_torch_compile_without_a_graph_break() -> None:
    inputs, cached = make_prefill(3, 90, 70, 16), make_decode(3, 1, 70, 16, fp8=True)

    def layer(q: torch.Tensor, *rest: torch.Tensor) -> Tensors:
        out, max_logits, lse = mla_sparse_prefill(q * 2, *rest, softmax_scale=0.05)
        return out + 1, max_logits, lse

    def step(q: torch.Tensor, *rest: torch.Tensor) -> Tensors:
        out, lse = mla_sparse_decode(q * 2, *rest, softmax_scale=0.05)
        return out + 1, lse

    for function, arguments in ((layer, inputs), (step, cached)):
        expected = function(*arguments)
        for got, want in zip(torch.compile(function, fullgraph=True)(*arguments), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_the_fastest_is_taken_unasked() -> None:
    hopper = capability("cuda") == (9, 0)
    inputs = make_prefill(3, 90, 70, 16)
    assert torch.equal(prefill(inputs, impl=None)[0], prefill(inputs, impl="hopper" if hopper else "triton")[0])
    cached = make_decode(3, 1, 70, 16, fp8=True)
    assert torch.equal(decode(cached, impl=None)[0], decode(cached)[0])
    cached = make_decode(16, 1, 70, 64, fp8=True)
    assert torch.equal(decode(cached, impl=None)[0], decode(cached, impl="hopper" if hopper else "triton")[0])
    with pytest.raises(RuntimeError, match="needs bfloat16 or float16"):
        prefill((inputs[0].float(), inputs[1].float(), inputs[2]))
