"""`merge_states` on a GPU: the real kernels against float64."""

import pytest
import torch

from mlakit.merge import merge_states, merge_states_reference, ops
from mlakit.testing import assert_close, compare_lse, poison_

pytestmark = pytest.mark.gpu


def states(n: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random states; some absent, with poison in their place, and the first token absent from all."""
    generator = torch.Generator("cuda").manual_seed(n + tokens)
    outs = torch.randn((n, tokens, heads, dim), generator=generator, device="cuda").to(dtype)
    lses = torch.randn((n, tokens, heads), generator=generator, device="cuda") * 3
    absent = torch.rand((n, tokens, heads), generator=generator, device="cuda") < 0.2
    absent[:, :1] = True
    poison = poison_(torch.empty_like(outs))
    return torch.where(absent[..., None], poison, outs), lses.masked_fill(absent, -torch.inf)


def check(outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    ref, ref_lse = merge_states_reference(outs.double(), lses.double())
    eager, _ = merge_states_reference(outs, lses)
    assert out.dtype == outs.dtype
    assert_close(out, ref, eager)
    found = compare_lse(lse, ref_lse)
    assert found.ok, found.reason


# From one state to more than the kernel takes as separate arguments (8), and as many as a split cache has; both value
# widths, one that is no power of two, and one; a batch of one token and one that fills the chip.
@pytest.mark.parametrize(
    ("n", "tokens", "heads", "dim"),
    [
        (1, 33, 16, 128),
        (2, 1000, 128, 128),
        (8, 77, 3, 512),
        (9, 77, 3, 512),
        (64, 5, 16, 512),
        (3, 17, 5, 100),
        (2, 1, 1, 1),
        (2, 0, 4, 64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward(n, tokens, heads, dim, dtype):
    outs, lses = states(n, tokens, heads, dim, dtype)
    check(outs, lses, *merge_states(outs, lses, impl="triton"))
    check(outs, lses, *merge_states(list(outs), list(lses), impl="triton"))


def test_strided_states():
    outs, lses = states(3, 60, 8, 128, torch.bfloat16)
    heads_first = outs[0].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.zeros((60, 8, 192), dtype=torch.bfloat16, device="cuda")
    wide[..., 64:] = outs[1]
    sparse = torch.zeros((120, 8, 128), dtype=torch.bfloat16, device="cuda")
    sparse[::2] = outs[2]
    logs = (lses[0].T.contiguous().T, lses[1], lses[2])
    check(outs, lses, *merge_states((heads_first, wide[..., 64:], sparse[::2]), logs, impl="triton"))
    by_token = outs.transpose(0, 1).contiguous().transpose(0, 1)
    check(outs, lses, *merge_states(by_token, lses.transpose(0, 1).contiguous().transpose(0, 1), impl="triton"))


def test_more_than_2_to_31_elements():
    # 140000 tokens of 128 heads of 128 in each state; only the end is compared.
    tokens, last = 140_000, 50
    outs = torch.zeros((2, tokens, 128, 128), dtype=torch.bfloat16, device="cuda")
    lses = torch.zeros((2, tokens, 128), device="cuda")
    assert (tokens - last) * 128 * 128 > 2**31
    outs[:, -last:], lses[:, -last:] = states(2, last, 128, 128, torch.bfloat16)
    for args in ((outs, lses), (list(outs), list(lses))):
        out, lse = merge_states(*args, impl="triton")
        check(outs[:, -last:], lses[:, -last:], out[-last:], lse[-last:])
        assert not out[:-last].any()


@pytest.mark.parametrize("through", ["out", "lse", "both"])
@pytest.mark.parametrize("separate", [True, False])
def test_gradients(through, separate):
    outs, lses = states(3, 50, 8, 128, torch.float32)
    d_out, d_lse = torch.randn((50, 8, 128), device="cuda"), torch.randn((50, 8), device="cuda")

    def gradients(outs: torch.Tensor, lses: torch.Tensor, impl: str) -> tuple[torch.Tensor, ...]:
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


@pytest.mark.parametrize("separate", [True, False])
def test_cuda_graph(separate):
    outs, lses = states(2, 100, 16, 128, torch.bfloat16)
    args = (list(outs), list(lses)) if separate else (outs, lses)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        merge_states(*args, impl="triton")  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = merge_states(*args, impl="triton")
    for seed_tokens in (100, 101):
        fresh, fresh_lses = states(2, seed_tokens, 16, 128, torch.bfloat16)
        outs.copy_(fresh[:, :100])
        lses.copy_(fresh_lses[:, :100])
        poison_(out)
        poison_(lse)
        graph.replay()
        check(outs, lses, out.clone(), lse.clone())


@pytest.mark.parametrize("separate", [True, False])
def test_torch_compile(separate):
    outs, lses = states(3, 40, 4, 128, torch.bfloat16)

    def run(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        args = (list(outs.unbind(0)), list(lses.unbind(0))) if separate else (outs, lses)
        return merge_states(*args, impl="triton")

    check(outs, lses, *torch.compile(run, fullgraph=True)(outs, lses))


def test_opcheck():
    outs, lses = states(3, 10, 2, 64, torch.bfloat16)
    outs = outs.nan_to_num()
    torch.library.opcheck(ops.merge_stacked, (outs.clone().requires_grad_(), lses.clone().requires_grad_()))
    separate = ([x.clone().requires_grad_() for x in outs], [x.clone().requires_grad_() for x in lses])
    torch.library.opcheck(ops.merge_separate, separate)
