"""The layer is the one that transformers has: the same weights give the same outputs, gradients and cached decoding."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from mlakit.nn import ATTN_IMPLS, get_mla
from mlakit.nn.checkpoint import args_from_hf_config, convert_hf_state_dict
from tests.support.layers import causal_mask

# transformers normalizes and takes the softmax in float32 whatever the dtype; outputs are of order 1.
CLOSE = {"rtol": 0, "atol": 5e-6}

DIMS: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 40,
    "max_position_embeddings": 96,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 24, "mscale": 1.0,
    "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip


class Pair:
    """Layers of transformers and of ours with the same weights."""

    def __init__(self, impl: str, dtype: torch.dtype, rope: dict[str, Any] = YARN, **config: Any) -> None:
        torch.manual_seed(0)
        self.config = DeepseekV3Config(**{**DIMS, "rope_parameters": dict(rope), **config})
        self.config._attn_implementation = "eager"
        self.theirs = DeepseekV3Attention(self.config, layer_idx=0).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in self.theirs.named_parameters():  # their own norms of 1 would hide one left out
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=parameter.shape[1] ** -0.5)
        self.rotary = DeepseekV3RotaryEmbedding(self.config)
        args = args_from_hf_config(self.config, page_size=8, max_batch_size=4)
        self.ours = get_mla(impl, args).to(dtype).eval()
        state = convert_hf_state_dict(self.theirs.state_dict(), args, rope_interleave=bool(self.config.rope_interleave))
        self.ours.load_state_dict(state)
        self.table = self.ours.precompute_freqs_cis()
        self.cache, self.dtype = DynamicCache(config=self.config), dtype

    def random(self, bsz: int, seqlen: int) -> torch.Tensor:
        return torch.randn(bsz, seqlen, self.config.hidden_size, dtype=self.dtype)

    def run_theirs(self, x: torch.Tensor, start: int, mask: torch.Tensor | None, cached: bool = True) -> torch.Tensor:
        positions = torch.arange(start, start + x.shape[1])[None].expand(x.shape[0], -1)
        cos, sin = (part.to(self.dtype) for part in self.rotary(torch.empty(0), positions))
        cache = self.cache if cached else None
        given = None if mask is None else mask[None, None].to(self.dtype)
        return self.theirs(x, position_embeddings=(cos, sin), attention_mask=given, past_key_values=cache)[0]

    def run_ours(self, x: torch.Tensor, start: int, mask: torch.Tensor | str | None) -> torch.Tensor:
        return self.ours(x, start, self.table[start : start + x.shape[1]], mask)


# With and without a low rank of queries; weights in pairs and in halves; no YaRN, DeepSeek-V3's, DeepSeek-V2's weaker
# one, one whose corrections differ (so that the table has an amplitude), one that gives none of them, one that gives
# the amplitude itself, and none of both ends of its range of frequencies.
@pytest.mark.parametrize("impl", ATTN_IMPLS)
@pytest.mark.parametrize(
    ("rope", "config"),
    [
        (DEFAULT, {}),
        (DEFAULT, {"q_lora_rank": None}),
        (YARN, {}),
        (YARN, {"q_lora_rank": None, "rope_interleave": False}),
        (DEFAULT, {"rope_interleave": False}),
        ({**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, {}),
        ({**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}, {}),
        ({name: value for name, value in YARN.items() if "mscale" not in name}, {}),
        ({name: value for name, value in YARN.items() if name != "mscale"}, {}),
        ({**YARN, "attention_factor": 1.3}, {}),
        ({**YARN, "beta_fast": 1.5, "beta_slow": 0.2, "factor": 10.0}, {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prefill(impl, dtype, rope, config):
    pair = Pair(impl, dtype, rope, **config)
    x, mask = pair.random(2, 37), causal_mask(37)
    with torch.no_grad():
        expected, got = pair.run_theirs(x, 0, mask), pair.run_ours(x, 0, "causal")
    assert 0.1 < expected.abs().mean() < 10
    torch.testing.assert_close(got, expected, **CLOSE)


# A prompt in one piece and in two, single tokens, and three speculative ones; past the context of before YaRN.
@pytest.mark.parametrize("impl", ATTN_IMPLS)
@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("pieces", [[20, 1, 1, 1], [9, 15, 1, 3, 1]])
def test_decode_with_its_cache(impl, q_lora_rank, pieces):
    pair, start = Pair(impl, torch.float64, q_lora_rank=q_lora_rank), 0
    with torch.no_grad():
        for number, seqlen in enumerate(pieces):
            x, end = pair.random(3, seqlen), start + seqlen
            expected = pair.run_theirs(x, start, causal_mask(seqlen, end))
            mask = "causal" if number % 2 else causal_mask(seqlen, end)  # both ways of asking for it
            torch.testing.assert_close(pair.run_ours(x, start, mask), expected, **CLOSE)
            start = end


@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_without_a_mask_every_key_is_seen(impl):
    pair = Pair(impl, torch.float64)
    x = pair.random(2, 19)
    with torch.no_grad():
        expected = pair.run_theirs(x, 0, None)
        torch.testing.assert_close(pair.run_ours(x, 0, None), expected, **CLOSE)
        causal = pair.run_ours(x, 0, "causal")
    assert (causal - expected).abs().max() > 0.01


@pytest.mark.parametrize("impl", ["naive", "absorb"])
def test_any_mask(impl):
    pair = Pair(impl, torch.float64)
    first, second = pair.random(2, 11), pair.random(2, 5)
    window = causal_mask(11) + torch.full((11, 11), -torch.inf).tril_(-4)  # the last four tokens
    bias = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(pair.run_ours(first, 0, window), pair.run_theirs(first, 0, window), **CLOSE)
        torch.testing.assert_close(pair.run_ours(second, 11, bias), pair.run_theirs(second, 11, bias), **CLOSE)


@pytest.mark.parametrize("impl", ATTN_IMPLS)
@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_gradients(impl, q_lora_rank):
    pair = Pair(impl, torch.float64, q_lora_rank=q_lora_rank)
    pair.ours.train()
    x = pair.random(2, 13)
    weight = pair.random(2, 13)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    (pair.run_theirs(xs[0], 0, causal_mask(13), cached=False) * weight).sum().backward()
    (pair.run_ours(xs[1], 0, "causal") * weight).sum().backward()
    torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=0, atol=3e-5)
    theirs = convert_hf_state_dict(
        {n: p.grad for n, p in pair.theirs.named_parameters() if p.grad is not None}, pair.ours.args
    )
    ours = {name: parameter.grad for name, parameter in pair.ours.named_parameters()}
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)  # names a key that differs


def test_bfloat16():
    pair = Pair("fused", torch.bfloat16)
    x = pair.random(2, 37)
    with torch.no_grad():
        expected, got = pair.run_theirs(x, 0, causal_mask(37)), pair.run_ours(x, 0, "causal")
        exact = Pair("naive", torch.float64)
        exact.ours.load_state_dict({n: t.double() for n, t in pair.ours.state_dict().items()})
        reference = exact.run_ours(x.double(), 0, "causal")
    error, allowed = (got - reference).abs().max(), (expected - reference).abs().max()
    assert error < 2 * allowed
