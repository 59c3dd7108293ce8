import pytest
import torch

from mlakit.merge import merge_states, merge_states_reference, ops
from mlakit.testing import assert_close, compare_lse

pytestmark = pytest.mark.interpret


def states(n, tokens, heads, dim, dtype):
    """Random states; some absent, with NaN in their place, and the first token absent from all."""
    torch.manual_seed(0)
    outs, lses = torch.randn(n, tokens, heads, dim).to(dtype), torch.randn(n, tokens, heads) * 3
    absent = torch.rand(n, tokens, heads) < 0.2
    absent[:, :1] = True
    outs[absent] = torch.nan
    return outs, lses.masked_fill(absent, -torch.inf)


def check(outs, lses, out, lse):
    ref, ref_lse = merge_states_reference(outs.double(), lses.double())
    eager, _ = merge_states_reference(outs, lses)
    assert out.dtype == outs.dtype
    assert_close(out, ref, eager)
    found = compare_lse(lse, ref_lse)
    assert found.ok, found.reason


# One state; two, as in chunked prefill; the most that are read where they lie, and one more, which are stacked. Widths
# of MHA and MQA mode, one that is no power of two, and one; a single token, and none.
@pytest.mark.parametrize(
    ("n", "tokens", "heads", "dim"),
    [(1, 3, 2, 128), (2, 5, 3, 128), (8, 3, 1, 20), (9, 7, 3, 512), (2, 1, 1, 1), (2, 0, 2, 16)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_forward(n, tokens, heads, dim, dtype):
    outs, lses = (
        states(n, tokens, heads, dim, dtype)
        if tokens
        else (torch.zeros(n, 0, heads, dim).to(dtype), torch.zeros(n, 0, heads))
    )
    check(outs, lses, *merge_states(outs, lses, impl="triton"))
    check(outs, lses, *merge_states(list(outs.unbind(0)), list(lses.unbind(0)), impl="triton"))


def test_strided_states():
    # Each in a layout of its own: heads first, a slice of wider heads, every other token.
    outs, lses = states(3, 6, 4, 32, torch.float16)
    heads_first = outs[0].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.zeros(6, 4, 48, dtype=torch.float16)
    wide[..., 16:] = outs[1]
    sparse = torch.zeros(12, 4, 32, dtype=torch.float16)
    sparse[::2] = outs[2]
    logs = [lses[0].T.contiguous().T, lses[1], lses[2]]
    check(outs, lses, *merge_states((heads_first, wide[..., 16:], sparse[::2]), logs, impl="triton"))
    by_token = outs.transpose(0, 1).contiguous().transpose(0, 1)
    check(outs, lses, *merge_states(by_token, lses.transpose(0, 1).contiguous().transpose(0, 1), impl="triton"))


# Through out, through lse and through both, for states in one tensor and in several.
@pytest.mark.parametrize("through", ["out", "lse", "both"])
@pytest.mark.parametrize("separate", [True, False])
def test_backward(through, separate):
    outs, lses = states(3, 5, 2, 16, torch.float32)
    d_out, d_lse = torch.randn(5, 2, 16), torch.randn(5, 2)

    def gradients(outs, lses, impl):
        outs, lses = outs.requires_grad_(), lses.requires_grad_()
        merged = merge_states(*((list(outs), list(lses)) if separate else (outs, lses)), impl=impl)
        seeds = [d_out.to(outs.dtype), d_lse.to(lses.dtype)]
        seeds[1] = seeds[1].masked_fill(torch.isneginf(merged[1].detach()), 0.0)
        pick = {"out": slice(0, 1), "lse": slice(1, 2), "both": slice(0, 2)}[through]
        return torch.autograd.grad(merged[pick], (outs, lses), seeds[pick], materialize_grads=True)

    actual = gradients(outs.clone(), lses.clone(), "triton")
    expected = gradients(outs.double(), lses.double(), "reference")
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_opcheck():
    outs, lses = states(3, 4, 2, 16, torch.float16)
    outs = outs.nan_to_num()
    torch.library.opcheck(ops.merge_stacked, (outs.clone().requires_grad_(), lses.clone().requires_grad_()))
    separate = ([x.clone().requires_grad_() for x in outs], [x.clone().requires_grad_() for x in lses])
    torch.library.opcheck(ops.merge_separate, separate)
