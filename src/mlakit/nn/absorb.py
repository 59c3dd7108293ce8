"""The latent kept, the up-projections absorbed into query and output, attention in plain PyTorch."""

from typing import TYPE_CHECKING

import torch

from mlakit.nn.caches import LatentCache
from mlakit.nn.project import wants_grad
from mlakit.nn.step import Step

if TYPE_CHECKING:
    from mlakit.nn.mla import MultiheadLatentAttention


def attend(layer: "MultiheadLatentAttention", x: torch.Tensor, step: Step) -> torch.Tensor:
    """[bsz, seqlen, dim] to heads' outputs side by side, [bsz, seqlen, n_heads * v_head_dim]."""
    args = layer.args
    q_nope, q_pe = layer.query(x).split((args.qk_nope_head_dim, args.qk_rope_head_dim), dim=-1)
    latent, k_pe = layer.wkv_a(x).split((args.kv_lora_rank, args.qk_rope_head_dim), dim=-1)
    q_pe, k_pe = step.rotate(q_pe), step.rotate(k_pe.unsqueeze(2)).squeeze(2)
    latents, k_pes = _keep(step, layer.kv_norm(latent), k_pe, args.scale_fmt)
    up_k, up_v = layer.up_projections(x.dtype)

    q_latent = torch.einsum("bshd,hdc->bshc", q_nope, up_k)
    scores = torch.einsum("bshc,btc->bsht", q_latent, latents) + torch.einsum("bshr,btr->bsht", q_pe, k_pes)
    out = torch.einsum("bsht,btc->bshc", step.weights(scores * layer.softmax_scale), latents)
    return torch.einsum("bshc,hdc->bshd", out, up_v).flatten(2)


def _keep(
    step: Step, latent: torch.Tensor, k_pe: torch.Tensor, scale_fmt: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the new tokens; the latents and rotated keys of all that they may look at, [bsz, end, ...]."""
    if step.cache is None:
        return latent, k_pe
    assert isinstance(step.cache, LatentCache)
    step.cache.write(step.start, latent, k_pe, scale_fmt)
    if step.begins:
        return latent, k_pe
    if isinstance(step.start, int) and wants_grad(latent, k_pe):
        rows = step.cache.read(step.bsz, step.start).clone()
        rows = torch.cat((rows, torch.cat((latent, k_pe), dim=-1)), dim=1)
    else:
        rows = step.only_live(step.cache.read(step.bsz, step.end))
    latents, k_pes = rows.split((latent.shape[-1], k_pe.shape[-1]), dim=-1)
    return latents, k_pes
