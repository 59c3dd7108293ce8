"""Attention in plain PyTorch with keys and values a head: for MLA after expanding the latent, and for standard
attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.torch_common import TorchBackend, hidden_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mlakit.backends.problem import MLAProblem, StandardProblem


class TorchNaive(TorchBackend):
    """Two matrix products and a float32 softmax, requests of equal shape batched."""

    name = "torch_naive"
    summary = "plain PyTorch: for MLA expands the latent to K and V, then attends"
    attention = frozenset({"mla", "standard"})
    decode_mode = "mha"
    prefill_mode = "mha"

    def prepare_mha(self, problem: MLAProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Keys and values arrive ragged, [keys, heads, dim]."""
        plans = [(g, hidden_keys(g, problem)) for g in problem.batch.groups]

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            for group, hidden in plans:
                out[group.rows] = _attend(q[group.rows], k[group.keys], v[group.keys], hidden, problem.softmax_scale)
            return out

        return run

    def prepare_standard(self, problem: StandardProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Keys and values are gathered from their pages first."""
        slots = problem.batch.slots
        plans = [(g, slots[g.keys], hidden_keys(g, problem)) for g in problem.batch.groups]

        def run(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            k_tokens, v_tokens = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
            for group, at, hidden in plans:
                out[group.rows] = _attend(q[group.rows], k_tokens[at], v_tokens[at], hidden, problem.softmax_scale)
            return out

        return run


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Q [n, q_len, heads, dim], k and v [n, kv_len, kv_heads, dim]: [n, q_len, heads, v_dim]."""
    import torch

    n, q_len, heads, _ = q.shape
    kv_heads = k.shape[2]
    # Query heads that share a key head become rows of one product, so that keys are not copied for each.
    rows = q.view(n, q_len, kv_heads, heads // kv_heads, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = torch.matmul(rows, k.permute(0, 2, 3, 1)).float().mul_(scale)
    scores = scores.view(n, kv_heads, heads // kv_heads, q_len, -1)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    out = torch.matmul(weights.flatten(2, 3), v.transpose(1, 2))
    return out.view(n, kv_heads, heads // kv_heads, q_len, -1).permute(0, 3, 1, 2, 4).reshape(n, q_len, heads, -1)
