"""Keys and values expanded and kept, attention in plain PyTorch; short sequences without a tensor of scores."""

from typing import TYPE_CHECKING

import torch

from mlakit.nn.flash import attend_to_new
from mlakit.nn.project import project
from mlakit.nn.step import Step

if TYPE_CHECKING:
    from mlakit.nn.mla import MultiheadLatentAttention


def attend(layer: "MultiheadLatentAttention", x: torch.Tensor, step: Step) -> torch.Tensor:
    """[bsz, seqlen, dim] to heads' outputs side by side, [bsz, seqlen, n_heads * v_head_dim]."""
    if is_short(step, layer.args.fast_path_tokens):
        return attend_to_new(layer, x, step).flatten(2)
    q, k, v = project(layer, x, step)
    scores = torch.einsum("bshd,bthd->bsht", q, k) * layer.softmax_scale
    return torch.einsum("bsht,bthd->bshd", step.weights(scores), v).flatten(2)


def is_short(step: Step, tokens: int) -> bool:
    """Whether the short path applies: nothing came before, few tokens, and no mask but perhaps the causal one."""
    return step.begins and step.seqlen <= tokens and step.mask is None
