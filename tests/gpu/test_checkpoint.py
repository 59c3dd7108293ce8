"""Checkpoints into layers on a GPU, and transformers' models by our kernel."""

import pytest
import torch

from mlakit.nn.checkpoint import load_checkpoint, save_checkpoint
from mlakit.quant import weight_dequant, weight_quant
from mlakit.testing import assert_close
from tests.support.layers import make_layers

pytestmark = pytest.mark.gpu


def _layer(kind, device="cuda"):
    return make_layers(torch.bfloat16, device=device, impls=("fused",), dtype=kind)["fused"]


@pytest.mark.parametrize("naming", ["deepseek", "hf"])
def test_loaded_on_the_gpu(tmp_path, naming):
    for source_kind in ("bf16", "fp8"):
        source, path = _layer(source_kind, "cpu"), tmp_path / f"{source_kind}.safetensors"
        source.wo.weight.view(torch.uint8)[::2] = source.wo.weight.view(torch.uint8)[
            1
        ]  # not what every layer begins with
        save_checkpoint(source, path, layer=1, naming=naming)
        for kind in ("bf16", "fp8"):
            layer = _layer(kind)
            done = load_checkpoint(layer, path, layer=1)
            expected = source.wo.weight
            if source_kind == kind:
                assert done["wo.weight"] == "copied"
            elif kind == "bf16":
                assert done["wo.weight"] == "dequantized"
                expected = weight_dequant(expected, source.wo.scale)
            else:
                assert done["wo.weight"] == "quantized"
                expected, scale = weight_quant(expected)
                assert torch.equal(layer.wo.scale.cpu(), scale)
            assert layer.wo.weight.is_cuda
            assert torch.equal(layer.wo.weight.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_of_transformers_attends_by_mla_prefill(padded):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed here")
    from mlakit.compat.transformers import register

    register()
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=256, hidden_size=256, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8, first_k_dense_replace=2, q_lora_rank=128, kv_lora_rank=128,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.DeepseekV3ForCausalLM(config).cuda().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.bfloat16()  # so that the same weights are used in float32
    tokens = torch.randint(0, 256, (3, 200), device="cuda")
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :77] = mask[1, 150:] = 0

    @torch.no_grad()
    def logits(implementation, dtype):
        model.set_attn_implementation(implementation)
        return model.to(dtype)(tokens, attention_mask=mask).logits[mask.bool()]

    exact = logits("eager", torch.float32)
    assert_close(logits("mlakit", torch.bfloat16), exact, logits("eager", torch.bfloat16))
