"""Models of transformers give the same answers by mlakit as by their own eager attention."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from mlakit.compat.transformers import attention, padding_mask, register

DEEPSEEK: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 3, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 24, "v_head_dim": 20,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "max_position_embeddings": 64, "num_mtp_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
# Left of rows, right of rows, in between (which makes a hole in the keys), a request that is nearly all padding.
PADDING = torch.ones(4, 13, dtype=torch.long)
PADDING[0, :5] = PADDING[1, 9:] = PADDING[2, 4:7] = PADDING[3, :12] = 0


def _pair(kind):
    register()
    torch.manual_seed(0)
    config, model = (DeepseekV3Config(**DEEPSEEK), DeepseekV3ForCausalLM) if kind == "deepseek" else (
        LlamaConfig(**LLAMA), LlamaForCausalLM
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = model(config).eval()
    with torch.no_grad():  # weights of their 0.02 leave hardly anything to attend to
        for parameter in theirs.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    ours = model(type(config)(**config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.set_attn_implementation("mlakit")
    assert ours.config._attn_implementation == "mlakit"
    return theirs, ours


@pytest.mark.parametrize("kind", ["deepseek", "llama"])
@pytest.mark.parametrize("padded", [False, True])
def test_prefill(kind, padded):
    theirs, ours = _pair(kind)
    tokens = torch.randint(0, 64, (4, 13))
    mask = PADDING if padded else None
    with torch.no_grad():
        expected, got = (model(tokens, attention_mask=mask).logits for model in (theirs, ours))
    live = PADDING.bool() if padded else torch.ones(4, 13, dtype=torch.bool)
    torch.testing.assert_close(got[live], expected[live], rtol=0, atol=1e-4)
    assert got[live].std() > 0.1


@pytest.mark.parametrize("kind", ["deepseek", "llama"])
def test_generation_from_prompts_of_different_lengths(kind):
    theirs, ours = _pair(kind)
    prompts, mask = torch.randint(1, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0  # generation pads on the left
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected, got = (
        model.generate(prompts, return_dict_in_generate=True, output_logits=True, **options) for model in (theirs, ours)
    )
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients(padded):
    theirs, ours = _pair("deepseek")
    tokens = torch.randint(0, 64, (4, 13))
    mask = PADDING if padded else None
    live = PADDING.bool() if padded else torch.ones(4, 13, dtype=torch.bool)
    for model in (theirs, ours):
        logits = model(tokens, attention_mask=mask).logits[live]
        torch.nn.functional.cross_entropy(logits, tokens[live]).backward()
    expected, got = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (theirs, ours))
    assert "model.layers.0.self_attn.kv_b_proj.weight" in expected
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_masks_that_are_not_causal_are_refused():
    _, ours = _pair("deepseek")
    tokens = torch.randint(0, 64, (1, 6))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="expected the causal mask, got another one"):
        ours(tokens, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match=r"takes a padding mask \[1, 6\], got a mask of shape \[1, 1, 6, 6\]"):
        ours(tokens, attention_mask=torch.zeros(1, 1, 6, 6))
    with pytest.raises(ValueError, match=r"expected 0 \+ 6 keys from 0 on, got 32 from 0 on"):
        ours(tokens, past_key_values=StaticCache(config=ours.config, max_cache_len=32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "expected attention_dropout 0, got 0.1"),
        ({"sliding_window": 4}, "mlakit has no sliding_window, got sliding_window=4"),
        ({"softcap": 30.0}, "mlakit has no softcap"),
        ({"attention_mask": torch.ones(1, 5, dtype=torch.bool)}, r"takes a padding mask \[1, 6\], got a mask of"),
    ],
)
def test_options_that_the_kernel_does_not_have(options, message):
    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=message):
        attention(torch.nn.Module(), x, x, x, **{"attention_mask": None, **options})


def test_both_directions_if_the_layer_says_so():
    q, k, v = (torch.randn(2, 4, length, 8) for length in (3, 5, 5))
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    got, weights = attention(module, q, k, v, None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    assert weights is None
    assert padding_mask(2, 3, 3, attention_mask=torch.ones(2, 3)) is None
