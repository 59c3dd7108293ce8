"""Small layers of every implementation with the same weights, and inputs for them."""

from typing import Any

import torch

from mlakit.nn import ATTN_IMPLS, Args, MultiheadLatentAttention, get_mla

# Widths that differ from one another, so that two of them confused would show; a latent of 128, as the float8 cache
# wants it; heads of 16 and 40 columns, pages of 8 tokens.
TINY: dict[str, Any] = {
    "max_batch_size": 4,
    "max_seq_len": 96,
    "dim": 48,
    "n_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 40,
    "page_size": 8,
}


def make_layers(
    compute: torch.dtype = torch.float64, *, device: str = "cpu", impls: tuple[str, ...] = ATTN_IMPLS, **args: Any
) -> dict[str, MultiheadLatentAttention]:
    """The implementations, in evaluation mode and without gradients, with the same random weights."""
    layers: dict[str, MultiheadLatentAttention] = {}
    torch.manual_seed(0)
    for impl in impls:
        layer = (
            get_mla(impl, Args(**{**TINY, "attn_impl": impl, **args})).to(device, compute).eval().requires_grad_(False)
        )
        if layers:
            layer.load_state_dict(next(iter(layers.values())).state_dict())
        else:
            with torch.no_grad():  # norms of 1 would hide a norm that is left out
                for name, parameter in layer.named_parameters():
                    if name.endswith("norm.weight"):
                        parameter.uniform_(0.5, 1.5)
        layers[impl] = layer
    return layers


def random_x(layer: MultiheadLatentAttention, bsz: int, seqlen: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Hidden states of unit variance."""
    weight = layer.wkv_a.weight
    dtype = dtype or weight.dtype
    return torch.randn(bsz, seqlen, layer.args.dim, dtype=torch.float64).to(weight.device, dtype)


def causal_mask(seqlen: int, end: int | None = None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A materialized causal mask, as DeepSeek's model makes it."""
    end = seqlen if end is None else end
    return torch.full((seqlen, end), -torch.inf, dtype=dtype).triu_(end - seqlen + 1)
