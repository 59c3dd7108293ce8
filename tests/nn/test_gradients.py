"""Gradients flow through every implementation, agree, and are right."""

import pytest
import torch

from mlakit.nn import ATTN_IMPLS
from tests.support.layers import causal_mask, make_layers, random_x


def _gradients(layer, x, seqlen, mask):
    layer.requires_grad_(True).train()
    x = x.clone().requires_grad_(True)
    out = layer(x, 0, layer.precompute_freqs_cis()[:seqlen], mask)
    target = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * target).sum().backward()
    return {"x": x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}


# Within the fast path and past it; a mask that is causal, none, and none at all.
@pytest.mark.parametrize("seqlen", [1, 40, 257])
@pytest.mark.parametrize("mask", ["causal", None, "tensor"])
@pytest.mark.parametrize("args", [{}, {"q_lora_rank": 0}], ids=str)
def test_all_implementations_have_the_same_gradients(seqlen, mask, args):
    layers = make_layers(max_seq_len=257, **args)
    x = random_x(layers["naive"], 2, seqlen)
    found = {
        impl: _gradients(layer, x, seqlen, causal_mask(seqlen) if mask == "tensor" else mask)
        for impl, layer in layers.items()
    }
    for name, expected in found["naive"].items():
        assert expected is not None, name
        if seqlen > 1 or "kv" in name or name in ("x", "wo.weight"):
            assert expected.abs().max() > 0, name  # one token's weights do not depend on its score
        for impl in ATTN_IMPLS[1:]:
            torch.testing.assert_close(found[impl][name], expected, rtol=1e-9, atol=1e-11, msg=f"{impl} {name}")


@pytest.mark.parametrize("impl", ATTN_IMPLS)
@pytest.mark.parametrize("start", [0, 2])
def test_gradcheck(impl, start):
    """Against finite differences, also behind a context that is constant."""
    tiny = {"dim": 5, "n_heads": 2, "q_lora_rank": 3, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 3}
    layer = make_layers(impls=(impl,), kv_lora_rank=4, max_seq_len=8, **tiny)[impl]
    freqs = layer.precompute_freqs_cis()
    cache = layer.make_cache(2)
    context = random_x(layer, 2, start) if start else None
    layer.requires_grad_(True).train()
    x = random_x(layer, 2, 3).requires_grad_(True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        if context is not None:
            with torch.no_grad():
                layer(context, 0, freqs[:start], "causal", cache)
        given = (x, start, freqs[start : start + 3], "causal", cache)
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), given)

    # The context is written with the layer's own weights, which are not varied.
    parameters = [parameter.detach().clone().requires_grad_(True) for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x, *parameters), atol=1e-6)


@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_training_writes_no_cache(impl):
    layer = make_layers(impls=(impl,))[impl].requires_grad_(True).train()
    x, freqs = random_x(layer, 2, 4), layer.precompute_freqs_cis()
    layer(x, 0, freqs[:4], "causal").sum().backward()
    own = layer._own_cache
    assert own is None
    with pytest.raises(ValueError, match=r"no earlier tokens are kept, got start_pos=4: a layer in training mode"):
        layer(x[:, :1], 4, freqs[4:5])
    with torch.no_grad():
        layer(x, 0, freqs[:4], "causal")
        layer(x[:, :1], 4, freqs[4:5])
    assert vars(layer)["_own_cache"].filled == 5


@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_what_was_kept_carries_no_gradient(impl):
    """As served: steps outside no_grad, one after the other, each with a gradient of its own."""
    layer = make_layers(impls=(impl,))[impl].requires_grad_(True)
    x, freqs = random_x(layer, 1, 5).requires_grad_(True), layer.precompute_freqs_cis()
    first = layer(x[:, :4], 0, freqs[:4], "causal")
    second = layer(x[:, 4:], 4, freqs[4:5])
    (grad,) = torch.autograd.grad(second.sum(), x, retain_graph=True)
    assert grad[:, :4].abs().max() == 0
    assert grad[:, 4].abs().max() > 0
    (grad,) = torch.autograd.grad(first.sum(), x)
    assert grad[:, :4].abs().amin(-1).min() > 0


@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_a_layer_learns(impl):
    """A few steps of gradient descent towards another layer's outputs lower the loss tenfold, alike for all."""
    layer = make_layers(impls=(impl,))[impl].requires_grad_(True).train()
    torch.manual_seed(5)
    x, freqs = random_x(layer, 4, 12), layer.precompute_freqs_cis()[:12]
    target = torch.tanh(x.flip(-1)) * 0.5
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = (layer(x, 0, freqs, "causal") - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
