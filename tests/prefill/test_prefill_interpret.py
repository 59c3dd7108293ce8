import pytest
import torch

from mlakit.merge import merge_states
from mlakit.prefill import mla_prefill, mla_prefill_reference, ops
from mlakit.testing import assert_close, compare_lse, count_poison, poison_

pytestmark = pytest.mark.interpret

DTYPE = torch.float16  # the interpreter's products of bfloat16 are wrong, and refused


def cu(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(
    q_lens: list[int], k_lens: list[int], heads: int, kv_heads: int, qk_dim: int, v_dim: int, padding: int = 0
) -> Inputs:
    """Random tensors; `padding` rows of poison after the last sequence."""
    torch.manual_seed(0)
    shapes = ((sum(q_lens), heads, qk_dim), (sum(k_lens), kv_heads, qk_dim), (sum(k_lens), kv_heads, v_dim))
    tensors = []
    for rows, h, d in shapes:
        x = torch.randn(rows + padding, h, d).to(DTYPE)
        poison_(x[rows:])
        tensors.append(x)
    q, k, v = tensors
    return q, k, v, cu(*q_lens), cu(*k_lens)


def check(q, k, v, cu_q, cu_k, out, lse, causal, scale):
    rows, keys = int(cu_q[-1]), int(cu_k[-1])
    q, k, v = q[:rows], k[:keys], v[:keys]
    ref, ref_lse = mla_prefill_reference(
        q.double(), k.double(), v.double(), cu_q, cu_k, softmax_scale=scale, causal=causal
    )
    eager, _ = mla_prefill_reference(q, k, v, cu_q, cu_k, softmax_scale=scale, causal=causal)
    assert_close(out[:rows], ref, eager)
    found = compare_lse(lse[:rows], ref_lse)
    assert found.ok, found.reason
    assert not out[rows:].any()
    assert torch.isneginf(lse[rows:]).all()


# DeepSeek's dims with lengths on both sides of a tile, an empty sequence of queries, one of keys, and more queries than
# keys (rows without keys); shared heads with dims that are no powers of two and need padding; a single token; 576/512;
# nothing at all.
@pytest.mark.parametrize(
    ("q_lens", "k_lens", "heads", "kv_heads", "qk_dim", "v_dim"),
    [
        ([5, 0, 37, 3, 6], [5, 4, 70, 0, 2], 2, 2, 192, 128),
        ([129, 1], [129, 65], 1, 1, 64, 64),
        ([33, 3], [35, 64], 6, 2, 40, 12),
        ([1], [1], 3, 1, 100, 96),
        ([3], [19], 3, 1, 576, 512),
        ([], [], 2, 1, 32, 32),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_forward(q_lens, k_lens, heads, kv_heads, qk_dim, v_dim, causal):
    args = inputs(q_lens, k_lens, heads, kv_heads, qk_dim, v_dim, padding=3)
    out = poison_(torch.empty(sum(q_lens) + 3, heads, v_dim, dtype=DTYPE))
    got, lse = mla_prefill(*args, softmax_scale=qk_dim**-0.5, causal=causal, out=out, impl="triton")
    assert got is out
    assert count_poison(out) == 0
    check(*args, out, lse, causal, qk_dim**-0.5)


def test_more_sequences_than_one_vector_of_lengths():
    # 128 lengths are looked at together; the later ones are found too, empty ones between them.
    lens = [max(0, i % 60 - 57) for i in range(150)]
    lens[-3:] = [3, 0, 2]
    args = inputs(lens, lens, 1, 1, 16, 16)
    out, lse = mla_prefill(*args, softmax_scale=0.25, impl="triton")
    check(*args, out, lse, True, 0.25)


def test_strided_views():
    # k and v side by side in one tensor, q and out with other heads between theirs, and a layout of heads first.
    kv = torch.randn(40, 2, 80).to(DTYPE)
    k, v = kv[..., :48], kv[..., 48:]
    q = torch.randn(33, 4, 2, 48).to(DTYPE)[:, :, 1]
    out = torch.zeros(33, 4, 2, 32, dtype=DTYPE)[:, :, 0]
    cu_q, cu_k = cu(33), cu(40)
    _, lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.2, out=out, impl="triton")
    check(q, k, v, cu_q, cu_k, out, lse, True, 0.2)
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    again, _ = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.2, impl="triton")
    assert torch.equal(again, out)


# The rope part of the keys apart, shared by all heads or not, k and v side by side in one tensor.
@pytest.mark.parametrize(("kv_heads", "pe_heads"), [(2, 1), (2, 2), (1, 1)])
def test_keys_in_two_parts(kv_heads, pe_heads):
    torch.manual_seed(0)
    kv = torch.randn(40, kv_heads, 64).to(DTYPE)
    parts = [torch.randn(33, 2, 48).to(DTYPE), kv[..., :32], kv[..., 32:], torch.randn(40, pe_heads, 16).to(DTYPE)]
    cu_q, cu_k = cu(33), cu(40)
    d_out, d_lse = torch.randn(33, 2, 32).to(DTYPE), torch.randn(33, 2)

    def run(convert, impl):
        q, k, v, k_pe = leaves = [convert(x).requires_grad_() for x in parts]
        out, lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.2, k_pe=k_pe, impl=impl)
        grads = torch.autograd.grad((out, lse), leaves, (d_out.to(out.dtype), d_lse.to(lse.dtype)))
        return out.detach(), lse.detach(), grads

    out, lse, grads = run(torch.clone, "triton")
    ref, ref_lse, ref_grads = run(torch.Tensor.double, "reference")
    eager, _, eager_grads = run(torch.clone, "reference")
    assert_close(out, ref, eager)
    assert compare_lse(lse, ref_lse).ok
    for name, got, want, base in zip(("q", "k", "v", "k_pe"), grads, ref_grads, eager_grads, strict=True):
        assert_close(got, want, base, f"gradient of {name}")
    plain_q, plain_k, plain_v, plain_pe = (x.detach() for x in parts)
    again = poison_(torch.empty_like(out))
    mla_prefill(plain_q, plain_k, plain_v, cu_q, cu_k, softmax_scale=0.2, k_pe=plain_pe, out=again, impl="triton")
    assert torch.equal(again, out)


def test_large_scores_do_not_overflow():
    q, k, v, cu_q, cu_k = inputs([20], [40], 1, 1, 32, 32)
    # Scores of some hundreds: exp of the largest is far beyond float32.
    out, lse = mla_prefill(q * 8, k * 8, v, cu_q, cu_k, softmax_scale=1.0, impl="triton")
    assert lse.max() > 100
    check(q * 8, k * 8, v, cu_q, cu_k, out, lse, True, 1.0)


@pytest.mark.parametrize("hint", [1, 37, 10**6])
def test_hint_never_changes_more_than_rounding(hint):
    args = inputs([5, 37], [5, 70], 1, 1, 64, 32)
    out, lse = mla_prefill(*args, softmax_scale=0.1, max_seqlen_q=hint, impl="triton")
    check(*args, out, lse, True, 0.1)


# Gradients of out alone, of lse alone and of both: with shared heads and padding, with rows without keys and with keys
# that no query sees; padding of the buffers holds poison. DeepSeek's dims, and dims that need padding.
@pytest.mark.parametrize(
    ("q_lens", "k_lens", "heads", "kv_heads", "qk_dim", "v_dim"),
    [([5, 0, 37, 3, 6], [5, 4, 70, 0, 2], 1, 1, 192, 128), ([33, 3], [35, 34], 4, 2, 40, 12)],
)
@pytest.mark.parametrize(("causal", "through"), [(True, "both"), (False, "both"), (True, "out"), (True, "lse")])
def test_backward(q_lens, k_lens, heads, kv_heads, qk_dim, v_dim, causal, through):
    q, k, v, cu_q, cu_k = inputs(q_lens, k_lens, heads, kv_heads, qk_dim, v_dim, padding=3)
    rows, keys = int(cu_q[-1]), int(cu_k[-1])
    d_out = torch.randn(rows, heads, v_dim).to(DTYPE)
    d_lse = torch.randn(rows, heads)

    def gradients(convert, **options):
        used = (rows, keys, keys) if options.get("impl") != "triton" else (None, None, None)
        leaves = [convert(x[:n]).requires_grad_() for x, n in zip((q, k, v), used, strict=True)]
        a, b, c = leaves
        out, lse = mla_prefill(a, b, c, cu_q, cu_k, softmax_scale=0.1, causal=causal, **options)
        ends, seeds = [], []
        if through != "lse":
            ends.append(out[:rows])
            seeds.append(d_out.to(out.dtype))
        if through != "out":
            finite = ~torch.isneginf(lse[:rows].detach())
            ends.append(lse[:rows][finite])
            seeds.append(d_lse[finite].to(lse.dtype))
        # v has no part in lse.
        return torch.autograd.grad(ends, leaves, seeds, materialize_grads=True)

    actual = gradients(torch.clone, impl="triton")
    reference = gradients(torch.Tensor.double, impl="reference")
    eager = gradients(torch.clone, impl="reference")
    for name, got, ref, base in zip("qkv", actual, reference, eager, strict=True):
        n = ref.shape[0]
        assert_close(got[:n], ref, base, f"gradient of {name}")
        assert not got[n:].any()


def test_broadcast_gradient():
    # The gradient of a sum is one value, expanded: stride 0 in every dimension.
    q, k, v, cu_q, cu_k = inputs([5], [7], 2, 1, 32, 32)

    def gradients(q, k, v, impl):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, _ = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.2, impl=impl)
        return torch.autograd.grad(out.sum(), leaves)

    expected = gradients(q.double(), k.double(), v.double(), "reference")
    got = gradients(q, k, v, "triton")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-2, rtol=1e-2)


def test_chunked_prefill_equals_unchunked():
    # New tokens 7 and 3, contexts of 40 and none: the context in chunks of 16, then the new tokens among themselves.
    new, context = [7, 3], [40, 0]
    q, k, v, cu_q, cu_k = inputs(new, [n + c for n, c in zip(new, context, strict=True)], 2, 1, 48, 32)
    outs, lses = [], []
    for start in range(0, 40, 16):
        lens = [max(0, min(c - start, 16)) for c in context]
        pieces = [slice(int(cu_k[i]) + start, int(cu_k[i]) + start + n) for i, n in enumerate(lens)]
        chunk_k, chunk_v = (torch.cat([x[p] for p in pieces]) for x in (k, v))
        out, lse = mla_prefill(q, chunk_k, chunk_v, cu_q, cu(*lens), softmax_scale=0.2, causal=False, impl="triton")
        outs.append(out)
        lses.append(lse)
    own = [slice(int(cu_k[i + 1]) - n, int(cu_k[i + 1])) for i, n in enumerate(new)]
    own_k, own_v = (torch.cat([x[s] for s in own]) for x in (k, v))
    out, lse = mla_prefill(q, own_k, own_v, cu_q, cu_q, softmax_scale=0.2, impl="triton")
    merged, merged_lse = merge_states([*outs, out], [*lses, lse], impl="triton")
    check(q, k, v, cu_q, cu_k, merged, merged_lse, True, 0.2)


def test_opcheck():
    q, k, v, cu_q, cu_k = inputs([5, 2], [5, 9], 2, 1, 32, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.mla_prefill, (*leaves, cu_q, cu_k, 0.2, True, -1))
    plain = [x.detach() for x in (q, k, v)]
    out, lse = ops.mla_prefill(*plain, cu_q, cu_k, 0.2, True, -1)
    torch.library.opcheck(ops.mla_prefill_out, (*plain, cu_q, cu_k, torch.zeros_like(out), 0.2, True, -1))
    q, k, v = leaves
    k_pe = torch.randn(14, 1, 16, dtype=DTYPE, requires_grad=True)
    torch.library.opcheck(ops.mla_prefill, (q, k[..., :16], v, cu_q, cu_k, 0.2, True, -1, k_pe))
    for d_lse in (None, torch.ones_like(lse)):
        torch.library.opcheck(
            ops.mla_prefill_backward, (torch.ones_like(out), d_lse, *plain, out, lse, cu_q, cu_k, 0.2, True)
        )
