"""The module under torch.compile."""

import pytest
import torch

from mlakit.nn import ATTN_IMPLS
from tests.support.layers import causal_mask, make_layers, random_x


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_compiled_equals_eager(impl):
    """Prefill, a chunk, steps, a tensor of starts: as eager, with the cache written the same."""
    eager = make_layers(torch.float32, impls=(impl,))[impl]
    layer = make_layers(torch.float32, impls=(impl,))[impl]
    compiled = torch.compile(layer, backend="eager")
    x, freqs = random_x(layer, 2, 30), layer.precompute_freqs_cis()
    steps = [(0, 20, "causal"), (20, 24, causal_mask(4, dtype=torch.float32)), (24, 25, None), (25, 26, None)]
    for begin, end, mask in steps:
        given = (x[:, begin:end], begin, freqs[begin:end], mask)
        torch.testing.assert_close(compiled(*given), eager(*given), rtol=1e-4, atol=1e-5)
    last = (x[:, 26:], torch.tensor([26, 26]), freqs, "causal")
    torch.testing.assert_close(compiled(*last), eager(*last), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_one_graph_with_a_cache_given(impl):
    """A prefill whose mask is not materialized, and a step, without a break; and gradients through it.

    AOTAutograd's graphs take half a minute, and inductor's more: tests/gpu has the latter.
    """
    layer = make_layers(torch.float32, impls=(impl,))[impl]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x, freqs, cache = random_x(layer, 2, 9), layer.precompute_freqs_cis(), layer.make_cache()
    out = torch.cat(
        (compiled(x[:, :8], 0, freqs[:8], "causal", cache), compiled(x[:, 8:], 8, freqs[8:9], None, cache)), 1
    )
    torch.testing.assert_close(out, layer(x, 0, freqs[:9], "causal"), rtol=1e-4, atol=1e-5)
    layer.requires_grad_(True).train()
    compiled(x, 0, freqs[:9], "causal").sum().backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(x, 0, freqs[:9], "causal").sum().backward()
    for grad, parameter in zip(grads, layer.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-4)
