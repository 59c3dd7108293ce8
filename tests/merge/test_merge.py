import pytest
import torch

from mlakit.merge import merge_states, merge_states_reference
from mlakit.prefill import mla_prefill_reference


def states(n=3, tokens=4, heads=2, dim=5, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(n, tokens, heads, dim, dtype=dtype), torch.randn(n, tokens, heads, dtype=dtype)


def test_reference_merges_disjoint_keys():
    # The whole is the sum of its parts: attention to 13 keys in pieces of 5, 0, 1 and 7.
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 6, dtype=torch.float64) for n in (3, 13, 13))
    outs, lses = [], []
    for start, end in ((0, 5), (5, 5), (5, 6), (6, 13)):
        cu_q, cu_k = torch.tensor([0, 3]), torch.tensor([0, end - start])
        out, lse = mla_prefill_reference(q, k[start:end], v[start:end], cu_q, cu_k, softmax_scale=0.4, causal=False)
        outs.append(out)
        lses.append(lse)
    expected = mla_prefill_reference(
        q, k, v, torch.tensor([0, 3]), torch.tensor([0, 13]), softmax_scale=0.4, causal=False
    )
    for merged in (merge_states(outs, lses), merge_states(torch.stack(outs), torch.stack(lses))):
        torch.testing.assert_close(merged, expected)


def test_reference_gradients_with_absent_states():
    outs, lses = states()
    lses[0, 0] = -torch.inf
    lses[:, 1] = -torch.inf

    def run(outs, finite):
        # gradcheck moves its inputs, and cannot move an infinity.
        out, lse = merge_states_reference(outs, torch.where(torch.isneginf(lses), lses, finite))
        return out, lse.masked_fill(torch.isneginf(lse), 0.0)

    out, lse = merge_states(outs, lses)
    assert not out[1].any()
    assert torch.isneginf(lse[1]).all()
    assert torch.isfinite(lse[[0, 2, 3]]).all()
    finite = lses.masked_fill(torch.isneginf(lses), 0.0)
    assert torch.autograd.gradcheck(run, (outs.requires_grad_(), finite.requires_grad_()))
    leaf = lses.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(merge_states(outs, leaf)[0].sum(), leaf)
    assert torch.isfinite(gradient).all()


def test_what_an_absent_state_holds_does_not_matter():
    outs, lses = states()
    lses[0, 0] = -torch.inf
    expected = merge_states(outs, lses)
    outs[0, 0] = torch.nan
    torch.testing.assert_close(merge_states(outs, lses), expected)


def test_far_apart_lses_neither_overflow_nor_vanish():
    outs, _ = states(dtype=torch.float32)
    lses = torch.tensor([1e4, 9.999e3, -1e4])[:, None, None].expand(3, 4, 2)
    out, lse = merge_states(outs, lses)
    weight = torch.tensor(1 / (1 + torch.e**-1))
    torch.testing.assert_close(out, outs[0] * weight + outs[1] * (1 - weight))
    torch.testing.assert_close(lse, torch.full((4, 2), 10000.3133), atol=2e-3, rtol=0)


def test_one_state_is_itself():
    outs, lses = states(n=1)
    out, lse = merge_states(outs, lses)
    torch.testing.assert_close(out, outs[0])
    torch.testing.assert_close(lse, lses[0])


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        (torch.zeros(4, 2, 5), torch.zeros(3, 4, 2), r"outs must have shape \[states, .* got \[4, 2, 5\]"),
        (torch.zeros(4, 2, 5), [torch.zeros(4, 2)], r"outs must have 4 dimensions .* got \[4, 2, 5\]"),
        (torch.zeros(3, 4, 2, 5), torch.zeros(4, 2), r"lses must have shape \[3, 4, 2\], got \[4, 2\]"),
        (torch.zeros(3, 4, 2, 5), torch.zeros(2, 4, 2), r"lses must have shape \[3, 4, 2\], got \[2, 4, 2\]"),
        (list(torch.zeros(3, 4, 2, 5)), torch.zeros(2, 4, 2), "as many states as outs, 3, got 2"),
        (torch.zeros(0, 4, 2, 5), torch.zeros(0, 4, 2), "outs must hold at least one state"),
        ([], [], "outs must hold at least one state, got none"),
        (torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 3), r"lses must have shape \[3, 4, 2\], got \[3, 4, 3\]"),
        ([torch.zeros(4, 2, 5)], [torch.zeros(4, 3)], r"lses\[0\] must have shape \[4, 2\], got \[4, 3\]"),
        ([torch.zeros(4, 2, 5), torch.zeros(3, 2, 5)], [torch.zeros(4, 2)] * 2, r"outs\[1\] must have shape"),
        (
            [torch.zeros(4, 2, 5), torch.zeros(4, 2, 5).half()],
            [torch.zeros(4, 2)] * 2,
            r"outs\[1\] must be torch.float32",
        ),
        (torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 2).half(), r"lses must be torch.float32 or torch.float64"),
        (torch.zeros(3, 4, 2, 10)[..., ::2], torch.zeros(3, 4, 2), r"outs must have stride 1"),
        ([torch.zeros(4, 2, 10)[..., ::2]], [torch.zeros(4, 2)], r"outs\[0\] must have stride 1"),
        (torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 2, device="meta"), r"lses must be on cpu .* got meta"),
        (torch.zeros(3, 4, 0, 5), torch.zeros(3, 4, 0), "at least one state, head and dim, got"),
    ],
)
def test_wrong_inputs(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge_states(outs, lses)


@pytest.mark.parametrize(
    ("dtype", "interpret", "message"),
    [(torch.float32, "0", "needs an NVIDIA GPU .* cpu"), (torch.float64, "1", "computes in float32, got float64")],
)
def test_triton_refuses_with_the_reason(monkeypatch, dtype, interpret, message):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(RuntimeError, match=f"merge_states: impl='triton' cannot run: .*{message}"):
        merge_states(*states(dtype=dtype), impl="triton")
