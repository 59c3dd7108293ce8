"""`mla_decode` over float8 caches: what the numbers mean, what is refused, and the portable kernels on them."""

from typing import TYPE_CHECKING, Any

import pytest
import torch

from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.decode import mla_decode, mla_decode_reference
from mlakit.testing import assert_close, compare_lse, count_poison, poison_

if TYPE_CHECKING:
    from tests.decode.conftest import Batch, MakeBatch

E4M3 = torch.float8_e4m3fn
RANK, ROPE = 128, 16  # a rank with one scale
# How the cache is kept, how the query comes, and their scales.
KINDS = [("e4m3", E4M3, 2.0, 0.25), ("e4m3", torch.float16, 1.0, 0.5), ("rows", torch.float16, 1.0, 1.0)]


def as_fp8(batch: "Batch", kind: str, q_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The batch's inputs with a float8 cache; what was NaN, because nobody promised it, is NaN."""
    q, cache, table, lens = batch.inputs
    rank = batch.rank
    small = cache.to(E4M3) if kind == "e4m3" else pack_fp8(cache[..., :rank], cache[..., rank:])
    return q.to(q_dtype), small, table, lens


def check(inputs: tuple[torch.Tensor, ...], out: torch.Tensor, lse: torch.Tensor, options: dict[str, Any]) -> None:
    q, cache, *rest = inputs
    keys = cache
    if cache.dtype == torch.uint8:  # as a kernel may round them
        keys = unpack_fp8(cache, options["kv_lora_rank"], out.dtype)
    expected, expected_lse = mla_decode_reference(q.double(), cache, *rest, **options)
    _, rounded_lse = mla_decode_reference(q.double(), keys, *rest, **options)
    eager, _ = mla_decode_reference(q.to(out.dtype), keys, *rest, **options)
    assert_close(out, expected, eager)
    found = compare_lse(lse, expected_lse, rounded_lse)
    assert found.ok, found.reason


# The definition: the codes times their scales, attended to as any cache is.
@pytest.mark.parametrize(("kind", "q_dtype", "q_scale", "kv_scale"), KINDS)
def test_the_reference_multiplies_by_the_scales(
    make_batch: "MakeBatch", kind: str, q_dtype: torch.dtype, q_scale: float, kv_scale: float
) -> None:
    q, cache, table, lens = as_fp8(make_batch([0, 1, 37], q_len=2, rank=RANK, rope=ROPE), kind, q_dtype)
    keys = cache.double() * kv_scale if kind == "e4m3" else unpack_fp8(cache, RANK, torch.float64)
    expected = mla_decode(q.double() * q_scale, keys, table, lens, softmax_scale=0.1, kv_lora_rank=RANK)
    scales = {"q_scale": q_scale, "kv_scale": kv_scale} if kind == "e4m3" and q_dtype == E4M3 else {}
    if kind == "e4m3":
        scales["kv_scale"] = kv_scale
    out, lse = mla_decode(q, cache, table, lens, softmax_scale=0.1, kv_lora_rank=RANK, **scales)
    assert out.dtype == (torch.bfloat16 if q_dtype == E4M3 else q_dtype)
    torch.testing.assert_close(out.double(), expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_scale": 2.0}, r"q_scale must be 1 where there is no tensor of torch\.float8_e4m3fn to multiply, got 2\.0"),
        ({"kv_scale": torch.ones(1)}, r"kv_scale must be a number, got a tensor of shape \[1\]"),
        ({"kv_scale": 0.0}, "kv_scale must be positive and finite, got 0"),
        ({"kv_scale": float("nan")}, "kv_scale must be positive and finite, got nan"),
        ({"q": torch.zeros(1, 1, 3, 144).to(E4M3), "cache": torch.zeros(2, 16, 144)}, "cache must be .*e4m3.*float32"),
        ({"cache": torch.zeros(2, 16, 144, dtype=torch.uint8)}, r"cache must have shape .*164.*144"),
        ({"cache": torch.zeros(2, 16, 144, dtype=torch.int8)}, "cache must be .*int8"),
        ({"cache": torch.zeros(2, 16, 164, dtype=torch.uint8), "kv_scale": 2.0}, "kv_scale must be 1 where"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(1, 1, 3, 144, dtype=torch.float16),
        "cache": torch.zeros(2, 16, 144).to(E4M3),
        "block_table": torch.zeros((1, 2), dtype=torch.int32),
        "seq_lens": torch.ones(1, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        mla_decode(**{**given, **change}, softmax_scale=0.1, kv_lora_rank=RANK)


def test_opcheck(make_batch: "MakeBatch") -> None:
    inputs = as_fp8(make_batch([5, 0], rank=RANK, rope=ROPE), "rows", torch.float16)
    # (It compares no tensors of float8_e4m3fn.)
    torch.library.opcheck(torch.ops.mlakit.mla_decode, (*inputs, 0.1, True, RANK, None, None, 1.0, 1.0))


# Under the interpreter, which has no e4m3: the conversion in integers. Pages below, at and above the tile of 32 keys; a
# rank of one scale, of four, and (codes alone) of less than one.
@pytest.mark.interpret
@pytest.mark.parametrize(("kind", "q_dtype", "q_scale", "kv_scale"), KINDS)
@pytest.mark.parametrize(("rank", "page_size", "lens"), [(128, 16, [0, 1, 70]), (512, 64, [33])])
def test_the_portable_kernels(
    make_batch: "MakeBatch", kind: str, q_dtype: torch.dtype, q_scale: float, kv_scale: float, rank: int,
    page_size: int, lens: list[int],
) -> None:  # fmt: skip
    batch = make_batch(lens, q_len=2, rank=rank, rope=ROPE, page_size=page_size)
    inputs = as_fp8(batch, kind, q_dtype)
    out = poison_(torch.empty((len(lens), 2, 3, rank), dtype=torch.float16))
    options: dict[str, Any] = {"softmax_scale": 0.1, "kv_lora_rank": rank, "q_scale": q_scale, "kv_scale": kv_scale}
    _, lse = mla_decode(*inputs, out=out, impl="triton", **options)
    assert count_poison(out) == 0
    check(inputs, out, lse, options)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("target", "heads", "kind", "q_dtype"),
    [
        (90, 16, "rows", torch.bfloat16),
        (90, 128, "e4m3", E4M3),
        (80, 128, "rows", torch.float16),
    ],
)
def test_the_portable_kernels_do_not_spill(target: int, heads: int, kind: str, q_dtype: torch.dtype) -> None:
    from mlakit.decode.triton_launch import _launch_decode
    from mlakit.hardware import shared_limit
    from mlakit.testing.offline import offline

    width, dtype = (576, E4M3) if kind == "e4m3" else (656, torch.uint8)
    out_dtype = torch.bfloat16 if q_dtype == E4M3 else q_dtype
    with offline(target) as kernels:
        _launch_decode(
            torch.empty((300, 1, heads, 576), dtype=q_dtype),
            torch.empty((2, 64, width), dtype=dtype),
            torch.empty((300, 128), dtype=torch.int32),
            torch.empty(300, dtype=torch.int32),
            torch.empty((300, 1, heads, 512), dtype=out_dtype),
            torch.empty((300, 1, heads)),
            softmax_scale=1.0,
            causal=True,
            kv_lora_rank=512,
            num_splits=None,
        )
    for kernel in kernels:
        assert kernel.spills == 0, kernel.name
        assert kernel.shared_bytes <= shared_limit((target // 10, 0))
