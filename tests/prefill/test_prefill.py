import re
import subprocess
import sys

import pytest
import torch

from mlakit.hardware import DeviceInfo, pretend, shared_limit
from mlakit.prefill import mla_prefill, mla_prefill_reference, ops
from mlakit.prefill.config import (
    backward_configs,
    forward_config,
    forward_shared_bytes,
    split_head_dim,
    value_width,
)
from mlakit.prefill.hopper_config import why_not_aligned, why_not_device, why_not_inputs

H200 = DeviceInfo("cuda", 0, "NVIDIA H200", (9, 0), 132, 60 * 2**20, 141 * 2**30)


def cu(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(
    q_lens: list[int],
    k_lens: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    qk_dim: int = 24,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    torch.manual_seed(0)
    q = torch.randn(sum(q_lens), heads, qk_dim, dtype=dtype)
    k = torch.randn(sum(k_lens), kv_heads, qk_dim, dtype=dtype)
    v = torch.randn(sum(k_lens), kv_heads, v_dim, dtype=dtype)
    return q, k, v, cu(*q_lens), cu(*k_lens)


# One sequence and several; as many keys as queries, more, and a single query; with and without shared heads.
@pytest.mark.parametrize(("q_lens", "k_lens"), [([7], [7]), ([3, 1, 65], [3, 130, 65]), ([5], [64])])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_reference_agrees_with_sdpa(q_lens, k_lens, kv_heads, causal):
    q, k, v, cu_q, cu_k = inputs(q_lens, k_lens, kv_heads=kv_heads)
    out, lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.3, causal=causal)
    for i, (q_len, k_len) in enumerate(zip(q_lens, k_lens, strict=True)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        mask = torch.ones(q_len, k_len, dtype=torch.bool)
        if causal:
            mask = mask.tril(k_len - q_len)
        q_i, k_i, v_i = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        expected = torch.nn.functional.scaled_dot_product_attention(
            q_i, k_i, v_i, attn_mask=mask, scale=0.3, enable_gqa=kv_heads != 4
        )
        torch.testing.assert_close(out[rows], expected[0].transpose(0, 1))
        scores = torch.einsum("qhd,khd->qhk", q[rows], k[keys].repeat_interleave(4 // kv_heads, 1)) * 0.3
        expected_lse = scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1)
        torch.testing.assert_close(lse[rows], expected_lse)


@pytest.mark.parametrize("causal", [True, False])
def test_reference_gradients_with_rows_without_keys(causal):
    # More queries than keys, no keys, no queries.
    q, k, v, cu_q, cu_k = inputs([3, 2, 0], [2, 0, 3], heads=2, kv_heads=1, qk_dim=3, v_dim=2)
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def run(q, k, v):
        out, lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.7, causal=causal)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    out, lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.7, causal=causal)
    empty = torch.tensor([causal, False, False, True, True])
    assert torch.equal(torch.isneginf(lse), empty[:, None].expand(5, 2))
    assert not out[empty].any()
    assert torch.autograd.gradcheck(run, (q, k, v))


# The rope part given apart, for all heads and for each kv head; the answer and every gradient are the concatenation's.
@pytest.mark.parametrize("pe_heads", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_keys_in_two_parts(pe_heads, causal):
    q, k, v, cu_q, cu_k = inputs([3, 5], [9, 5])
    k_pe = k[:, :pe_heads, 16:]
    whole = torch.cat([k[..., :16], k_pe.expand(-1, 2, -1)], dim=-1)
    parts = [x.detach().clone().requires_grad_() for x in (q, k[..., :16], v, k_pe)]
    leaves = [x.detach().clone().requires_grad_() for x in (q, whole, v)]
    q, k, v, k_pe = parts
    got = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.3, causal=causal, k_pe=k_pe)
    q, whole, v = leaves
    expected = mla_prefill_reference(q, whole, v, cu_q, cu_k, softmax_scale=0.3, causal=causal)  # autograd's gradients
    seeds = [torch.randn_like(x) for x in expected]
    dq, dk, dv, dk_pe = torch.autograd.grad(got, parts, seeds)
    dq_want, dk_want, dv_want = torch.autograd.grad(expected, leaves, seeds)
    rope = dk_want[..., 16:]
    wanted = (*expected, dq_want, dk_want[..., :16], dv_want, rope if pe_heads == 2 else rope.sum(1, keepdim=True))
    for a, b in zip((*got, dq, dk, dv, dk_pe), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_no_sequences():
    out, lse = mla_prefill(*inputs([], []), softmax_scale=1.0)
    assert out.shape == (0, 4, 16)
    assert lse.shape == (0, 4)


def test_out_is_filled_and_returned():
    args = inputs([5, 2], [5, 9])
    out = torch.full((7, 4, 16), torch.nan, dtype=torch.float64)
    got, lse = mla_prefill(*args, softmax_scale=0.3, out=out)
    expected, expected_lse = mla_prefill_reference(*args, softmax_scale=0.3)
    assert got is out
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def with_spare_rows(args: Inputs) -> Inputs:
    """The same sequences, and rows of NaN that are no sequence's."""
    q, k, v, cu_q, cu_k = args
    q, k, v = (torch.cat([x, x.new_full((2, *x.shape[1:]), torch.nan)]) for x in (q, k, v))
    return q, k, v, cu_q, cu_k


@pytest.mark.parametrize("k_lens", [[5, 9], [0, 0]])
def test_rows_of_no_sequence_get_zeros(k_lens):
    args = inputs([5, 2], k_lens)
    out, lse = mla_prefill(*with_spare_rows(args), softmax_scale=0.3)
    expected, expected_lse = mla_prefill(*args, softmax_scale=0.3)
    assert torch.equal(out, torch.cat([expected, torch.zeros_like(expected[:2])]))
    assert torch.equal(lse, torch.cat([expected_lse, torch.full_like(expected_lse[:2], -torch.inf)]))


# Several sequences, one without queries; keys in one part and in two. Both results and every gradient.
@pytest.mark.parametrize(("pe_heads", "causal"), [(0, True), (1, False), (2, True)])
@pytest.mark.parametrize("seeded", ["both", "lse"])
def test_compiles_without_a_graph_break(pe_heads, causal, seeded):
    q, k, v, cu_q, cu_k = with_spare_rows(inputs([3, 0, 5], [9, 4, 5], dtype=torch.float32))
    parts = [k] if pe_heads == 0 else [k[..., :16], k[:, :pe_heads, 16:].clone()]

    def run(q, v, k, k_pe=None):
        out, lse = mla_prefill(q * 2, k, v, cu_q, cu_k, softmax_scale=0.3, causal=causal, k_pe=k_pe)
        return out + 1, lse * 2

    def results(function):
        leaves = [x.detach().clone().requires_grad_() for x in (q, v, *parts)]
        out, lse = function(*leaves)
        wanted = out.sin().sum() * (seeded == "both") + lse[:8].sin().sum()
        return out, lse, *torch.autograd.grad(wanted, leaves)

    compiled = results(torch.compile(run, fullgraph=True, backend="aot_eager"))
    for got, want in zip(compiled, results(run), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_compiles_with_out():
    q, k, v, cu_q, cu_k = inputs([3, 0, 5], [9, 4, 5])

    def run(q, out):
        return mla_prefill(q * 2, k, v, cu_q, cu_k, softmax_scale=0.3, out=out)

    out = torch.full((8, 4, 16), torch.nan, dtype=q.dtype)
    _, lse = torch.compile(run, fullgraph=True, backend="aot_eager")(q, out)
    for got, want in zip((out, lse), run(q, torch.empty_like(out)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_operators_keep_their_schemas():
    q, k, v, cu_q, cu_k = args = inputs([3, 5], [9, 5])
    options = (0.3, True, -1, None, "reference")
    torch.library.opcheck(ops.mla_prefill, (*(x.clone().requires_grad_() for x in (q, k, v)), cu_q, cu_k, *options))
    out, lse = ops.mla_prefill(*args, *options)
    torch.library.opcheck(ops.mla_prefill_out, (*args, torch.zeros_like(out), *options))
    gradients = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, cu_q, cu_k, 0.3, True, "reference")
    torch.library.opcheck(ops.mla_prefill_backward, gradients)


def test_default_on_a_cpu_is_the_reference_whatever_the_environment(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = inputs([5], [5], dtype=torch.float16)
    out, _ = mla_prefill(*args, softmax_scale=0.3)
    assert torch.equal(out, mla_prefill_reference(*args, softmax_scale=0.3)[0])


# One wrong thing a case; each message names what was expected and what was found.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 4)}, r"q must have shape \[tokens, num_heads, qk_head_dim\], got \[5, 4\]"),
        ({"k": torch.zeros(9, 2, 25)}, r"k must have shape \[keys, num_kv_heads, 24\], got \[9, 2, 25\]"),
        ({"v": torch.zeros(8, 2, 16)}, r"v must have shape \[9, 2, v_head_dim\], got \[8, 2, 16\]"),
        ({"v": torch.zeros(9, 1, 16)}, r"v must have shape \[9, 2, v_head_dim\], got \[9, 1, 16\]"),
        ({"k": torch.zeros(9, 3, 24), "v": torch.zeros(9, 3, 16)}, "multiple of k's num_kv_heads 3, got 4"),
        ({"q": torch.zeros(5, 4, 24, dtype=torch.int32)}, "q must be torch.bfloat16 or .*, got torch.int32"),
        ({"k": torch.zeros(9, 2, 24, dtype=torch.float16)}, "k must be torch.float32, got torch.float16"),
        ({"v": torch.zeros(9, 2, 32)[..., ::2]}, r"v must have stride 1 in its last dimension, got strides"),
        ({"k": torch.zeros(9, 2, 24, device="meta")}, "k must be on cpu like the first argument, got meta"),
        ({"cu_seqlens_q": torch.tensor([0, 5])}, "cu_seqlens_q must be torch.int32, got torch.int64"),
        ({"cu_seqlens_k": cu(4, 5)}, r"cu_seqlens_k must have shape \[2\], got \[3\]"),
        ({"cu_seqlens_q": cu()[:0], "cu_seqlens_k": cu()[:0]}, "at least 1, got 0"),
        ({"k_pe": torch.zeros(9, 1, 8)}, r"k_pe must have shape \[9, 1 or num_kv_heads, 0\], got \[9, 1, 8\]"),
        (
            {"k": torch.zeros(9, 4, 16), "v": torch.zeros(9, 4, 16), "k_pe": torch.zeros(9, 2, 8)},
            "num_kv_heads 4, got 2",
        ),
        ({"k_pe": torch.zeros(9, 1, 0)}, r"must each have a column, got k \[9, 2, 24\], k_pe \[9, 1, 0\]"),
        (
            {"k": torch.zeros(9, 2, 16), "k_pe": torch.zeros(9, 1, 8).half()},
            "k_pe must be torch.float32, got torch.float16",
        ),
        ({"k": torch.zeros(9, 2, 16), "k_pe": torch.zeros(9, 1, 16)[..., ::2]}, "k_pe must have stride 1 in its last"),
        ({"softmax_scale": 0.0}, "softmax_scale must be positive and finite, got 0.0"),
        ({"softmax_scale": float("inf")}, "softmax_scale must be positive and finite, got inf"),
        ({"max_seqlen_q": -1}, "max_seqlen_q must be at least 0, got -1"),
        ({"out": torch.zeros(5, 4, 15)}, r"out must have shape \[5, 4, 16\], got \[5, 4, 15\]"),
        ({"out": torch.zeros(5, 4, 16).half()}, "out must be torch.float32, got torch.float16"),
        ({"out": torch.zeros(5, 4, 16), "q": torch.zeros(5, 4, 24).requires_grad_()}, "expected out=None"),
        ({"impl": "flash"}, "unknown impl 'flash'; expected one of reference, triton"),
    ],
)
def test_wrong_inputs(change, message):
    q, k, v, cu_q, cu_k = inputs([5], [9], dtype=torch.float32)
    args = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "softmax_scale": 0.3}
    with pytest.raises(ValueError, match=message):
        mla_prefill(**(args | change))


# What Triton cannot do: the reason is told, and the reference does not stand in.
@pytest.mark.parametrize(
    ("make", "interpret", "message"),
    [
        ({"dtype": torch.float32}, "1", "bfloat16 or float16, got torch.float32"),
        ({"dtype": torch.float16}, "0", "needs an NVIDIA GPU .* cpu"),
        ({"dtype": torch.bfloat16}, "1", "use float16 there"),
        ({"dtype": torch.float16, "qk_dim": 577}, "1", "up to 576 and 512, got 577 and 16"),
        ({"dtype": torch.float16, "v_dim": 513}, "1", "up to 576 and 512, got 24 and 513"),
    ],
)
def test_triton_refuses_with_the_reason(monkeypatch, make, interpret, message):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    args = inputs([5], [9], **make)
    with pytest.raises(RuntimeError, match=f"mla_prefill: impl='triton' cannot run: .*{message}"):
        mla_prefill(*args, softmax_scale=0.3, impl="triton")


def test_hopper_refuses_other_devices_with_the_reason():
    args = inputs([5], [9], qk_dim=192, v_dim=128, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"impl='hopper' cannot run: it needs compute capability 9.0 .*, got cpu"):
        mla_prefill(*args, softmax_scale=0.3, impl="hopper")
    for found in ((8, 0), (10, 0), (12, 0)):
        with pretend(DeviceInfo("cuda", 0, "another", found, 100, 2**25, 2**36)):
            assert why_not_device("cuda:0") == f"it needs compute capability 9.0 (Hopper), got {found[0]}.{found[1]}"
    with pretend(H200):
        assert why_not_device("cuda:0") is None


# Everything that the Hopper kernel refuses on a Hopper, one thing a case, and neighbours that it takes.
@pytest.mark.parametrize(
    ("make", "message"),
    [
        ({}, None),
        ({"qk": 128}, None),
        ({"qk": 64, "v": 64}, None),
        ({"pe": 64, "qk": 192}, None),
        ({"qk": 192, "stride": 40 * 8}, None),
        ({"dtype": torch.float32}, "it needs bfloat16 or float16, got torch.float32"),
        ({"qk": 256}, r"head dims may be 64, 128 or 192 .* got 256 and 128"),
        ({"qk": 96}, r"got 96 and 128"),
        ({"qk": 192, "pe": 32}, r"got 160 \+ 32 and 128"),
        ({"v": 256}, r"got 192 and 256"),
        ({"keys": 0}, "at least one key, got none"),
        ({"stride": 193}, r"k's rows and heads must lie multiples of 16 bytes apart, got strides \[386, 193, 1\]"),
        ({"rows": 2**31}, "may be up to .*, got"),
        ({"stride": 2**31}, r"k's heads may span up to 2\^31 elements, got 2147483840"),
    ],
)
def test_what_hopper_takes(make, message):
    qk, v_dim, pe, dtype = make.get("qk", 192), make.get("v", 128), make.get("pe", 0), make.get("dtype", torch.bfloat16)
    keys, stride = make.get("keys", 9), make.get("stride", 192)
    with pretend(H200):
        q = torch.empty((make.get("rows", 5), 128, qk), dtype=dtype, device="meta")
        k = torch.empty_strided((keys, 2, qk - pe), (2 * stride, stride, 1), dtype=dtype, device="meta")
        v = torch.empty((keys, 2, v_dim), dtype=dtype, device="meta")
        k_pe = torch.empty((keys, 1, pe), dtype=dtype, device="meta") if pe else None
        reason = why_not_inputs(q, k, v, k_pe, 3)
    if message is None:
        assert reason is None
    else:
        assert re.search(message, reason)


def test_bulk_loads_begin_at_16_bytes():
    x = torch.zeros(40, dtype=torch.bfloat16)
    x = x[-x.data_ptr() % 16 // 2 :]
    assert why_not_aligned(x, None, x[8:]) is None
    assert (
        why_not_aligned(x, x[3:]) == "q, k, v and k_pe must begin at multiples of 16 bytes, got an address of 6 mod 16"
    )


def test_triton_refuses_gradients_of_wide_heads(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, v, cu_q, cu_k = inputs([5], [9], qk_dim=576, v_dim=512, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="gradients need head dims up to 256, got 576 and 512"):
        mla_prefill(q.requires_grad_(), k, v, cu_q, cu_k, softmax_scale=0.3, impl="triton")


def test_triton_refuses_strides_past_32_bits(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, _, cu_q, cu_k = inputs([1], [1], dtype=torch.float16)
    far = torch.empty_strided((1, 2, 16), (2**24 + 1, 16, 1), dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"v may have up to .* stride of up to 16777216, got 1 at 16777217"):
        mla_prefill(q, k, far, cu_q, cu_k, softmax_scale=0.3, impl="triton")


def test_import_without_triton():
    code = "import sys, mlakit.prefill, mlakit.merge; assert 'torch' in sys.modules; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Every dim there may be: the parts cover it, are powers of two that tl.dot takes, and waste less than a single one.
@pytest.mark.parametrize("dim", [*range(1, 257), 576])
def test_split_head_dim(dim):
    split = split_head_dim(dim)
    for part in (split.main, split.rest):
        assert part == 0 or (part >= 16 and part & (part - 1) == 0)
    assert split.main >= split.rest
    assert dim <= split.width <= value_width(dim)
    assert split.padded == (split.width != dim)


def test_split_of_the_dims_in_use_pads_nothing():
    assert [(split_head_dim(d).main, split_head_dim(d).rest) for d in (64, 96, 128, 192, 256, 576)] == [
        (64, 0),
        (64, 32),
        (128, 0),
        (128, 64),
        (256, 0),
        (512, 64),
    ]


# Devices from the least shared memory to the most, and one that nobody has heard of.
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)])
@pytest.mark.parametrize("dims", [(192, 128), (64, 64), (256, 256), (576, 512)])
@pytest.mark.parametrize("rows", [1, 64, 65, 10**6])
def test_configurations_fit_the_device(capability: tuple[int, int], dims: tuple[int, int], rows: int) -> None:
    config = forward_config(*dims, capability, rows)
    assert forward_shared_bytes(config, *dims) <= shared_limit(capability)
    assert not config.tma or capability >= (9, 0)
    if max(dims) <= 256:
        for side in backward_configs(*dims, capability):
            assert side.block_m >= 16
            assert side.block_n >= 16
