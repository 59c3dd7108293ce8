"""The references against PyTorch's own attention, validation, and what does not need a kernel."""

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.sparse import mla_sparse_decode, mla_sparse_prefill, reference

if TYPE_CHECKING:
    from tests.sparse.conftest import MakeDecode, MakePrefill


def by_sdpa(q: torch.Tensor, keys: torch.Tensor, row: list[int], scale: float, d_v: int) -> torch.Tensor:
    """One token's heads over the keys of `row`, gathered one by one, by PyTorch's own attention."""
    valid = [i for i in row if 0 <= i < len(keys)]
    if not valid:
        return q.new_zeros((len(q), d_v))
    gathered = torch.stack([keys[i] for i in valid])[None].expand(len(q), -1, -1)
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q[:, None], gathered, gathered[..., :d_v], scale=scale)[:, 0]


# topk of one, of more than there are keys, and none; several key heads; no rope part.
@pytest.mark.parametrize(
    ("s_q", "s_kv", "topk", "options"),
    [
        (4, 30, 1, {}),
        (4, 5, 12, {"rope": 0}),
        (3, 30, 9, {"heads": 6, "kv_heads": 3}),
        (5, 30, 7, {"lengths": True}),
        (2, 8, 0, {}),
        (2, 0, 3, {}),
    ],
)
def test_prefill_reference_is_attention_over_gathered_keys(
    make_prefill: "MakePrefill", s_q: int, s_kv: int, topk: int, options: dict[str, Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 3 * max(topk, 1) * 80 * 8)  # three tokens at a time
    problem = make_prefill(s_q, s_kv, topk, dtype=torch.float64, **options)
    q, kv, indices = problem.inputs
    out, max_logits, lse = mla_sparse_prefill(*problem.inputs, **problem.options)
    lengths = problem.options.get("topk_length", torch.full((s_q,), topk))
    scale, d_v = problem.options["softmax_scale"], problem.options["d_v"]
    group = q.shape[1] // kv.shape[1]
    for t in range(s_q):
        for h in range(q.shape[1]):
            row = indices[t, h // group, : max(int(lengths[t]), 0)].tolist()
            keys = kv[:, h // group]
            torch.testing.assert_close(out[t, h : h + 1], by_sdpa(q[t, h : h + 1], keys, row, scale, d_v))
            scores = torch.tensor([float(q[t, h] @ keys[i]) * scale for i in row if 0 <= i < s_kv]).double()
            torch.testing.assert_close(lse[t, h], torch.logsumexp(scores, 0), rtol=1e-6, atol=1e-6)
            largest = scores.max() if len(scores) else torch.tensor(-torch.inf).double()
            torch.testing.assert_close(max_logits[t, h], largest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("lengths", ["", "request", "token"])
def test_decode_reference_is_prefill_s_over_slots(make_decode: "MakeDecode", fp8: bool, lengths: str) -> None:
    problem = make_decode(3, 2, 9, dtype=torch.float64, fp8=fp8, rank=128, lengths=lengths, sink=True)
    q, cache, indices = problem.inputs
    flat = cache.flatten(0, 1)
    keys = unpack_fp8(flat, 128, torch.float64) if fp8 else flat
    options = dict(problem.options)
    options["d_v"] = options.pop("kv_lora_rank")
    if lengths:
        options["topk_length"] = options["topk_length"].view(3, -1).expand(3, 2).flatten()
    expected, _, expected_lse = mla_sparse_prefill(
        q.flatten(0, 1), keys[:, None], indices.flatten(0, 1)[:, None], **options
    )
    out, lse = mla_sparse_decode(*problem.inputs, **problem.options)
    torch.testing.assert_close(out.flatten(0, 1), expected)
    torch.testing.assert_close(lse.flatten(0, 1), expected_lse)


def test_a_sink_is_one_more_key_without_a_value(make_prefill: "MakePrefill") -> None:
    q, kv, indices = make_prefill(4, 20, 6, dtype=torch.float64).inputs
    options: dict[str, Any] = {"softmax_scale": 0.1, "d_v": 64}
    plain, max_logits, lse = mla_sparse_prefill(q, kv, indices, **options)
    sink = torch.tensor([0.5, -torch.inf, torch.inf])
    out, *rest = mla_sparse_prefill(q, kv, indices, attn_sink=sink, **options)
    expected = plain * (lse.exp() / (lse.exp() + sink.double().exp()))[..., None].nan_to_num(0.0)
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[:, 1], plain[:, 1])
    assert not out[:, 2].any()
    for got, want in zip(rest, (max_logits, lse), strict=True):
        assert torch.equal(got, want)


def test_duplicates_count_as_given_and_order_does_not(make_prefill: "MakePrefill") -> None:
    q, kv, _ = make_prefill(1, 4, 4, dtype=torch.float64).inputs
    kv = kv.nan_to_num(0.3)
    options: dict[str, Any] = {"softmax_scale": 0.1, "d_v": 64}

    def run(*row: int) -> list[torch.Tensor]:
        return list(mla_sparse_prefill(q, kv, torch.tensor([[row]], dtype=torch.int32), **options))

    twice, once = run(0, 2, 2, -1), run(0, 2)
    assert not torch.allclose(twice[0], once[0])
    repeated = mla_sparse_prefill(
        q, torch.cat([kv, kv[2:3]]), torch.tensor([[[0, 2, 4]]], dtype=torch.int32), **options
    )
    for got, want, moved in zip(twice, repeated, run(2, 2147480000, 0, 2), strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got, moved)


# One case for every argument and every kind of mistake in it; each message must hold what was expected and what came.
@pytest.mark.parametrize(
    ("index", "change", "expected", "actual"),
    [
        (0, lambda q: q[0], r"q must have shape \[s_q, h_q, d_qk\]", r"got \[3, 80\]"),
        (0, lambda q: q.to(torch.int32), "q must be torch.bfloat16", "got torch.int32"),
        (0, lambda q: q.to(torch.bfloat16), "kv must be torch.bfloat16", "got torch.float16"),
        (0, lambda q: q.mT.contiguous().mT, "q must have stride 1", "strides"),
        (0, lambda q: q[:, :0], "heads that divides q's 0", "got 1"),
        (1, lambda kv: kv[..., :79], r"kv must have shape \[s_kv, h_kv, 80\]", "79"),
        (1, lambda kv: kv.expand(-1, 2, -1), "number of heads that divides q's 3", "got 2"),
        (
            1,
            lambda kv: torch.cat([kv, kv], -1).view(20, 2, 80).mT.contiguous().mT[:, :1],
            "kv must have stride 1",
            "st",
        ),
        (1, lambda kv: kv.to("meta"), "kv must be on cpu", "got meta"),
        (2, lambda i: i[:1], r"indices must have shape \[2, 1, topk\]", r"got \[1, 1, 5\]"),
        (2, lambda i: i.expand(-1, 3, -1), r"indices must have shape \[2, 1, topk\]", r"got \[2, 3, 5\]"),
        (2, lambda i: i.long(), "indices must be torch.int32", "torch.int64"),
        (2, lambda i: i.expand(2, 5, 5).mT[:, :1], "indices must have stride 1", "strides"),
        (2, lambda i: i.to("meta"), "indices must be on cpu", "got meta"),
    ],
)
def test_prefill_refuses_wrong_inputs(
    make_prefill: "MakePrefill", index: int, change: Any, expected: str, actual: str
) -> None:
    problem = make_prefill(2, 20, 5)
    inputs = list(problem.inputs)
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=f"{expected}.*{actual}"):
        mla_sparse_prefill(*inputs, **problem.options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_v": 81}, "d_v must be from 1 to q's last dimension 80, got 81"),
        ({"attn_sink": torch.zeros(2)}, r"attn_sink must have shape \[3\], got \[2\]"),
        ({"attn_sink": torch.zeros(3).half()}, "attn_sink must be torch.float32, got torch.float16"),
        ({"topk_length": torch.zeros(3, dtype=torch.int32)}, r"topk_length must have shape \[2\], got \[3\]"),
        ({"topk_length": torch.zeros(2)}, "topk_length must be torch.int32, got torch.float32"),
        ({"out": torch.empty(2, 3, 63, dtype=torch.float16)}, r"out must have shape \[2, 3, 64\], got"),
        ({"out": torch.empty(2, 3, 64)}, "out must be torch.float16, got torch.float32"),
        ({"out": torch.empty(2, 64, 3, dtype=torch.float16).mT}, "out must have stride 1"),
        ({"impl": "cuda"}, "unknown impl 'cuda'; expected one of reference, triton"),
    ],
)
def test_prefill_refuses_wrong_options(make_prefill: "MakePrefill", options: dict[str, Any], message: str) -> None:
    problem = make_prefill(2, 20, 5)
    with pytest.raises(ValueError, match=message):
        mla_sparse_prefill(*problem.inputs, **{**problem.options, **options})


@pytest.mark.parametrize(
    ("index", "change", "expected", "actual"),
    [
        (0, lambda q: q[0], r"q must have shape \[batch, q_len, num_heads, latent_dim\]", r"got \[1, 3, 80\]"),
        (0, lambda q: q[:, :0], "at least one token", r"\[2, 0, 3, 80\]"),
        (1, lambda c: c[..., :79], r"cache must have shape \[pages, page_size, 80\]", "79"),
        (1, lambda c: c[:, :0], "page size of at least 1", ", 0, 80"),
        (1, lambda c: c.float(), "cache must be torch.float16 or torch.uint8", "got torch.float32"),
        (2, lambda i: i[:, 0], r"indices must have shape \[2, 1, topk\]", r"got \[2, 5\]"),
        (2, lambda i: i.long(), "indices must be torch.int32", "torch.int64"),
    ],
)
def test_decode_refuses_wrong_inputs(
    make_decode: "MakeDecode", index: int, change: Any, expected: str, actual: str
) -> None:
    problem = make_decode(2, 1, 5)
    inputs = list(problem.inputs)
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=f"{expected}.*{actual}"):
        mla_sparse_decode(*inputs, **problem.options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_lora_rank": 81}, "kv_lora_rank must be from 1 to q's last dimension 80, got 81"),
        ({"num_splits": 0}, "num_splits must be None or at least 1, got 0"),
        ({"topk_length": torch.zeros(3, dtype=torch.int32)}, r"topk_length must have shape \[2\], got \[3\]"),
        ({"topk_length": torch.zeros(2, 2, dtype=torch.int32)}, r"topk_length must have shape \[2, 1\], got \[2, 2\]"),
        ({"out": torch.empty(2, 1, 3, 63, dtype=torch.float16)}, r"out must have shape \[2, 1, 3, 64\], got"),
    ],
)
def test_decode_refuses_wrong_options(make_decode: "MakeDecode", options: dict[str, Any], message: str) -> None:
    problem = make_decode(2, 1, 5)
    with pytest.raises(ValueError, match=message):
        mla_sparse_decode(*problem.inputs, **{**problem.options, **options})


def test_the_float8_cache_has_rows_of_its_own_width(make_decode: "MakeDecode") -> None:
    problem = make_decode(2, 1, 5, fp8=True, rank=128)
    with pytest.raises(ValueError, match=r"cache must have shape \[pages, page_size, 164\], got \[5, 16, 160\]"):
        mla_sparse_decode(problem.q, problem.cache[..., :160], problem.indices, **problem.options)
    with pytest.raises(ValueError, match="kv_lora_rank that is a multiple of 128, got 64"):
        mla_sparse_decode(problem.q, problem.cache, problem.indices, softmax_scale=1.0, kv_lora_rank=64)


def test_a_named_implementation_that_cannot_run_says_why(
    make_prefill: "MakePrefill", make_decode: "MakeDecode", monkeypatch: Any
) -> None:
    def refused(message: str, problem: Any) -> None:
        run = mla_sparse_prefill if problem.q.ndim == 3 else mla_sparse_decode
        with pytest.raises(RuntimeError, match=message):
            run(*problem.inputs, **problem.options, impl="triton")

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refused("impl='triton' cannot run: it needs an NVIDIA GPU", make_prefill(2, 9, 5))
    refused("impl='triton' cannot run: it needs an NVIDIA GPU", make_decode(2, 1, 5))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused(r"needs bfloat16 or float16, got torch\.float32", make_prefill(2, 9, 5, dtype=torch.float32))
    refused("value's width to be a power of two and at least 32, got 48", make_prefill(2, 9, 5, rank=48))
    refused("rope part to be absent, or a power of two and at least 16, got 8", make_prefill(2, 9, 5, rope=8))
    one = make_decode(2, 1, 5, fp8=True, rank=128)
    wide = torch.zeros((5, 16, 166), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="rows of the float8 cache must start at multiples of 4 bytes"):
        mla_sparse_decode(one.q, wide[..., :164], one.indices, **one.options, impl="triton")


def test_gradients_are_the_reference_s(make_prefill: "MakePrefill", monkeypatch: Any) -> None:
    problem = make_prefill(3, 20, 6, dtype=torch.float64)
    q, kv, indices = problem.q.requires_grad_(), problem.kv.nan_to_num(0.1), problem.indices
    out, _, _ = mla_sparse_prefill(q, kv, indices, **problem.options)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad[0].abs().sum() > 0
    assert q.grad.isfinite().all()
    with pytest.raises(ValueError, match="out must be None where a gradient is wanted"):
        mla_sparse_prefill(q, kv, indices, **problem.options, out=torch.empty_like(out))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="it has no gradient"):
        mla_sparse_prefill(q, kv, indices, **problem.options, impl="triton")


def test_operators_keep_their_schemas(make_prefill: "MakePrefill", make_decode: "MakeDecode") -> None:
    problem = make_prefill(2, 9, 5, dtype=torch.float32, sink=True)
    rest = (0.1, 64, problem.options["attn_sink"], None, "reference")
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_prefill, (*problem.inputs, *rest))
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_prefill_out, (*problem.inputs, torch.empty(2, 3, 64), *rest))
    one = make_decode(2, 1, 5, dtype=torch.float32, lengths="request")
    more = (0.1, 64, None, one.options["topk_length"], None, "reference")
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_decode, (*one.inputs, *more))
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_decode_out, (*one.inputs, torch.empty(2, 1, 3, 64), *more))


def test_compiles_without_a_graph_break(make_prefill: "MakePrefill", make_decode: "MakeDecode") -> None:
    problem = make_prefill(2, 9, 5, dtype=torch.float32, sink=True)
    one = make_decode(2, 1, 5, fp8=True, rank=128, dtype=torch.float32, lengths="token")

    def step(q: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = mla_sparse_prefill(q, *problem.inputs[1:], **problem.options)
        return *first, *mla_sparse_decode(new, *one.inputs[1:], **one.options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(problem.q, one.q), step(problem.q, one.q), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_gradients_compile_without_a_graph_break(make_prefill: "MakePrefill") -> None:
    problem = make_prefill(3, 20, 6, dtype=torch.float32, sink=True)
    kv = problem.kv.nan_to_num(0.1)

    def step(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return mla_sparse_prefill(q * 2, kv, problem.indices, **problem.options)[0].sin().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [problem.q.clone().requires_grad_(), kv.clone().requires_grad_()]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


# No keys at all, and none named.
@pytest.mark.parametrize(("keys", "topk"), [(0, 2), (3, 0)])
def test_the_reference_without_keys(keys: int, topk: int) -> None:
    indices = torch.zeros(2, 1, topk, dtype=torch.int32)
    out, largest, lse = mla_sparse_prefill(
        torch.ones(2, 3, 80), torch.ones(keys, 1, 80), indices, softmax_scale=1.0, d_v=64
    )
    assert not out.any()
    assert torch.isneginf(largest).all()
    assert torch.isneginf(lse).all()


def test_the_float8_reference_rounds_once() -> None:
    keys = torch.randn(8, 144)
    cache = pack_fp8(keys[:, :128], keys[:, 128:]).view(2, 4, -1)
    q = torch.zeros(1, 1, 1, 144, dtype=torch.float64)
    out, _ = mla_sparse_decode(q, cache, torch.tensor([[[5]]], dtype=torch.int32), softmax_scale=1.0, kv_lora_rank=128)
    assert torch.equal(out[0, 0, 0], unpack_fp8(cache[1, 1], 128, torch.float64)[:128])


def test_importing_the_operation_does_not_import_triton() -> None:
    code = "import mlakit.sparse, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
