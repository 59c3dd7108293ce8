"""Float8 weights and the float8 cache."""

import pytest
import torch

from mlakit.nn import ATTN_IMPLS, Linear
from mlakit.quant import weight_dequant
from tests.support.layers import make_layers, random_x


@pytest.mark.parametrize("gemm_impl", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", [(128, 256), (384, 136), (256, 24)])
def test_a_float8_linear_is_near_its_dequantized_weight(gemm_impl, shape):
    torch.manual_seed(0)
    linear = Linear(*shape, dtype="fp8", gemm_impl=gemm_impl)
    x = torch.randn(5, 3, shape[0], dtype=torch.bfloat16)
    full = weight_dequant(linear.weight, linear.scale, dtype=torch.float32).double()
    expected = x.double() @ full.T
    error = (linear(x).double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    # One rounding of weight and result; e4m3's 4 bits where the activations are quantized as well.
    assert error < (2**-4 if gemm_impl == "fp8" else 2**-7)
    assert full.std() == pytest.approx(shape[0] ** -0.5, rel=0.05)


def test_moving_a_layer_keeps_its_codes():
    linear = Linear(64, 64, dtype="fp8").double().to(torch.bfloat16)
    assert linear.weight.dtype == torch.float8_e4m3fn
    assert linear.scale.dtype == torch.float32
    assert linear.weight.is_meta is False
    assert Linear(64, 64, dtype="fp8").to("meta").weight.is_meta


def test_gradients_pass_through_float8_weights():
    layers = make_layers(dtype="fp8")
    grads = {}
    for impl, layer in layers.items():
        layer.train()
        x = random_x(layer, 2, 9, torch.float64).requires_grad_(True)
        layer(x, 0, layer.precompute_freqs_cis()[:9], "causal").square().sum().backward()
        grads[impl] = x.grad
        torch.manual_seed(0)
    layer = layers["naive"]
    torch.manual_seed(7)
    x = random_x(layer, 2, 9, torch.float64)
    found = []
    for layer in layers.values():
        own = x.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(layer(own, 0, layer.precompute_freqs_cis()[:9], "causal").sum(), own)
        found.append(grad)
    for grad in found[1:]:
        torch.testing.assert_close(grad, found[0], rtol=1e-6, atol=1e-8)
    assert all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("gemm_impl", ["bf16", "fp8"])
def test_implementations_agree_with_float8_weights(gemm_impl):
    layers = make_layers(torch.bfloat16, dtype="fp8", gemm_impl=gemm_impl, dim=128)
    x, freqs = random_x(layers["naive"], 2, 20, torch.bfloat16), layers["naive"].precompute_freqs_cis()
    outs = {}
    for impl, layer in layers.items():
        outs[impl] = torch.cat((layer(x[:, :19], 0, freqs[:19], "causal"), layer(x[:, 19:], 19, freqs[19:20])), 1)
    scale = outs["naive"].double().square().mean().sqrt()
    for impl in ATTN_IMPLS[1:]:
        error = (outs[impl].double() - outs["naive"].double()).square().mean().sqrt() / scale
        # Absorbed weights multiply other activations than expanded ones do, which e4m3 rounds to 4 bits.
        assert error < (2**-4 if gemm_impl == "fp8" else 2**-6), impl


def test_absorbed_weights_follow_the_parameter():
    """The dequantized up-projection is kept, but not longer than it is right."""
    layer = make_layers(torch.bfloat16, impls=("fused",), dtype="fp8")["fused"]
    first = layer.up_projections(torch.bfloat16)[0]
    assert layer.up_projections(torch.bfloat16)[0].data_ptr() == first.data_ptr()
    with torch.no_grad():
        layer.wkv_b.scale.mul_(2)
    torch.testing.assert_close(layer.up_projections(torch.bfloat16)[0], 2 * first)
    assert layer.up_projections(torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize("impl", ["absorb", "fused"])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_the_float8_cache(impl, scale_fmt):
    """A prefill does not feel it; steps behind it are as exact as 4 bits of latent allow."""
    exact = make_layers(impls=(impl,))[impl]
    layer = make_layers(impls=(impl,), cache_dtype="fp8", scale_fmt=scale_fmt)[impl]
    x, freqs = random_x(layer, 3, 40), layer.precompute_freqs_cis()
    cache = layer.make_cache()
    assert cache.pages.dtype == torch.uint8
    assert cache.pages.shape[-1] == 128 + 4 + 2 * 8
    for begin, end in ((0, 30), (30, 35), (35, 36), (36, 40)):
        given = (x[:, begin:end], begin, freqs[begin:end], "causal")
        actual, expected = layer(*given, cache), exact(*given)
        if begin == 0:
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
        else:
            error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            assert 1e-4 < error < 2**-4
    starts = torch.tensor([36, 36, 36])
    torch.testing.assert_close(layer(x[:, 36:], starts, freqs, "causal", cache), actual, rtol=1e-2, atol=1e-2)
