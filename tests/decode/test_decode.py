"""`mla_decode` on a CPU: what it refuses, what it chooses, and what torch sees of it."""

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mlakit.decode import mla_decode
from mlakit.testing import count_poison, poison_

if TYPE_CHECKING:
    from tests.decode.conftest import MakeBatch


def run(inputs: tuple[torch.Tensor, ...], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return mla_decode(*inputs, **{"softmax_scale": 0.1, "kv_lora_rank": 64, **options})


# Empty, one key, a page's end and its neighbours; fewer keys than new tokens; page sizes that are no power of two are
# the reference's.
@pytest.mark.parametrize(("q_len", "heads", "page_size"), [(1, 1, 1), (2, 3, 16), (4, 16, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_float64(make_batch: "MakeBatch", q_len: int, heads: int, page_size: int, dtype: torch.dtype) -> None:
    batch = make_batch([0, 1, 15, 16, 17, 63], q_len=q_len, heads=heads, page_size=page_size, dtype=dtype)
    batch.check(*run(batch.inputs, softmax_scale=batch.scale))


def test_against_pytorch_attention(make_batch: "MakeBatch") -> None:
    batch = make_batch([37], q_len=3, heads=4, dtype=torch.float64)
    out, lse = run(batch.inputs, softmax_scale=0.3)
    keys = batch.paged.pages.view(-1, 80)[batch.paged.slots][None, None]
    mask = torch.ones(3, 37, dtype=torch.bool).tril(37 - 3)
    q = batch.q.transpose(1, 2)
    expected = scaled_dot_product_attention(q, keys, keys[..., :64], attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    scores = (q @ keys.mT * 0.3).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1).transpose(1, 2))


def test_out_is_fully_written_and_returned(make_batch: "MakeBatch") -> None:
    batch = make_batch([0, 20], q_len=2)
    out = poison_(torch.empty((2, 2, 3, 64), dtype=batch.q.dtype))
    result, lse = run(batch.inputs, out=out, softmax_scale=batch.scale)
    assert result is out
    assert count_poison(out) == 0
    batch.check(out, lse)


@pytest.mark.parametrize("both", [True, False])
def test_lse_is_fully_written_and_returned(make_batch: "MakeBatch", both: bool) -> None:
    batch = make_batch([0, 20], q_len=2)
    out = poison_(torch.empty((2, 2, 3, 64), dtype=batch.q.dtype)) if both else None
    lse = poison_(torch.empty((2, 2, 3), dtype=torch.float32))
    result, logs = run(batch.inputs, out=out, lse=lse, softmax_scale=batch.scale)
    assert out is None or result is out
    assert logs is lse
    assert count_poison(lse) == 0
    batch.check(result, lse)


def test_no_requests(make_batch: "MakeBatch") -> None:
    q, cache, _, _ = make_batch([5]).inputs
    out, lse = run((q[:0], cache, torch.zeros((0, 4), dtype=torch.int32), torch.zeros(0, dtype=torch.int32)))
    assert out.shape == (0, 1, 3, 64)
    assert lse.shape == (0, 1, 3)


def replaced(inputs: tuple[torch.Tensor, ...], index: int, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return *inputs[:index], value, *inputs[index + 1 :]


# One case for every argument and every kind of mistake in it; each message must hold what was expected and what came.
@pytest.mark.parametrize(
    ("index", "change", "expected", "actual"),
    [
        (0, lambda q: q[0], r"q must have shape \[batch, q_len, num_heads, latent_dim\]", r"got \[1, 3, 80\]"),
        (0, lambda q: q[:, :0], "at least one token", r"\[2, 0, 3, 80\]"),
        (0, lambda q: q.to(torch.int32), "q must be torch.bfloat16", "got torch.int32"),
        (0, lambda q: q.to(torch.bfloat16), "cache must be torch.bfloat16", "got torch.float16"),
        (0, lambda q: q.mT.contiguous().mT, "q must have stride 1", "strides"),
        (1, lambda c: c[..., :79], r"cache must have shape \[pages, page_size, 80\]", "79"),
        (1, lambda c: c[:, :0], "page size of at least 1", ", 0, 80"),
        (1, lambda c: c.mT.contiguous().mT, "cache must have stride 1", "strides"),
        (2, lambda t: t[:1], r"block_table must have shape \[2, max_pages\]", r"got \[1, 2\]"),
        (2, lambda t: t.long(), "block_table must be torch.int32", "torch.int64"),
        (2, lambda t: t[:, :1], "holds? 16 keys", "seq_lens has 20"),
        (3, lambda n: n[:1], r"seq_lens must have shape \[2\]", r"got \[1\]"),
        (3, lambda n: n.long(), "seq_lens must be torch.int32", "torch.int64"),
        (3, lambda n: torch.stack([n, n], 1)[:, 0], "seq_lens must be contiguous", "stride 2"),
        (3, lambda n: -n, "must not be negative", "-20"),
        (3, lambda n: n.to("meta"), "seq_lens must be on cpu", "got meta"),
    ],
)
def test_refuses_wrong_inputs(make_batch: "MakeBatch", index: int, change: Any, expected: str, actual: str) -> None:
    inputs = make_batch([20, 4]).inputs
    with pytest.raises(ValueError, match=f"{expected}.*{actual}"):
        run(replaced(inputs, index, change(inputs[index])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_lora_rank": 80}, "kv_lora_rank must be at least 1 and below .* 80, got 80"),
        ({"num_splits": 0}, "num_splits must be None or at least 1, got 0"),
        ({"out": torch.empty(2, 1, 3, 63, dtype=torch.float16)}, r"out must have shape \[2, 1, 3, 64\], got"),
        ({"out": torch.empty(2, 1, 3, 64)}, "out must be torch.float16, got torch.float32"),
        ({"out": torch.empty(2, 1, 64, 3, dtype=torch.float16).mT}, "out must have stride 1"),
        ({"lse": torch.empty(2, 1, 4)}, r"lse must have shape \[2, 1, 3\], got"),
        ({"lse": torch.empty(2, 1, 3, dtype=torch.float16)}, "lse must be torch.float32, got torch.float16"),
        ({"lse": torch.empty(2, 1, 3, device="meta")}, "lse must be on cpu like the first argument, got meta"),
        ({"lse": torch.empty(2, 1, 4)[..., :3]}, r"lse must be contiguous, got strides \[4, 4, 1\]"),
        ({"impl": "cuda"}, "unknown impl 'cuda'; expected one of reference, triton, hopper"),
    ],
)
def test_refuses_wrong_options(make_batch: "MakeBatch", options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_batch([20, 4]).inputs, **options)


def test_a_named_implementation_that_cannot_run_says_why(make_batch: "MakeBatch", monkeypatch: Any) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: the tensors are on the CPU"):
        run(make_batch([4]).inputs, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"needs bfloat16, float16 or float8_e4m3fn, got torch\.float32"):
        run(make_batch([4], dtype=torch.float32).inputs, impl="triton")
    with pytest.raises(RuntimeError, match="page size that is a power of two, got 5"):
        run(make_batch([4], page_size=5).inputs, impl="triton")
    with pytest.raises(RuntimeError, match="kv_lora_rank to be a power of two and at least 32, got 48"):
        run(make_batch([4]).inputs, kv_lora_rank=48, impl="triton")


def test_gradients_are_the_reference_s(make_batch: "MakeBatch", monkeypatch: Any) -> None:
    q, *rest = make_batch([20, 3], dtype=torch.float64).inputs
    q.requires_grad_()
    out, _ = run((q, *rest))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="out must be None where a gradient is wanted"):
        run((q, *rest), out=torch.empty_like(out))
    with pytest.raises(ValueError, match="lse must be None where a gradient is wanted"):
        run((q, *rest), lse=torch.empty_like(out[..., 0]))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    half = make_batch([4]).inputs
    with pytest.raises(RuntimeError, match="it has no gradient"):
        run((half[0].requires_grad_(), *half[1:]), impl="triton")


def test_operators_keep_their_schemas(make_batch: "MakeBatch") -> None:
    batch = make_batch([20, 0], dtype=torch.float32)
    options = (batch.scale, True, batch.rank, None, "reference")
    torch.library.opcheck(torch.ops.mlakit.mla_decode, (*batch.inputs, *options))
    out = torch.empty((2, 1, 3, batch.rank))
    torch.library.opcheck(torch.ops.mlakit.mla_decode_out, (*batch.inputs, out, torch.empty((2, 1, 3)), *options))


def test_compiles_without_a_graph_break(make_batch: "MakeBatch") -> None:
    batch = make_batch([20, 7], dtype=torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = run(batch.inputs)
    for got, want in zip(compiled(batch.inputs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    out = torch.empty((2, 1, 3, 64))
    lse = torch.empty((2, 1, 3))
    compiled(batch.inputs, out=out, lse=lse)
    for got, want in zip((out, lse), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_importing_the_operation_does_not_import_triton() -> None:
    code = "import mlakit.decode, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
