"""MLA in plain PyTorch, absorbed: attention in the latent space, where all heads share one key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.torch_common import TorchBackend, hidden_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mlakit.backends.problem import MLAProblem


class TorchAbsorb(TorchBackend):
    """Matrix products and a float32 softmax over the latent cache, in both pipelines."""

    name = "torch_absorb"
    summary = "plain PyTorch, absorbed: attends in the latent space"
    attention = frozenset({"mla"})
    decode_mode = "mqa"
    prefill_mode = "mqa"

    def prepare_mqa(self, problem: MLAProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Heads and query tokens of a request fold into the rows of one product with its keys."""
        import torch

        batch, rank, scale = problem.batch, problem.dims.kv_lora_rank, problem.softmax_scale
        plans = [(g, batch.slots[g.keys], hidden_keys(g, problem)) for g in batch.groups]

        def run(q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            tokens = cache.flatten(0, 1)
            for group, slots, hidden in plans:
                keys = tokens[slots]  # [requests, kv_len, latent_dim]
                rows = q[group.rows]  # [requests, q_len, heads, latent_dim]
                scores = torch.matmul(rows.flatten(1, 2), keys.transpose(1, 2)).float().mul_(scale)
                scores = scores.view(*rows.shape[:3], group.kv_len)
                if hidden is not None:
                    scores.masked_fill_(hidden[:, None], -torch.inf)
                weights = torch.softmax(scores, dim=-1).to(q.dtype)
                out[group.rows] = torch.matmul(weights.flatten(1, 2), keys[..., :rank]).view(*rows.shape[:3], rank)
            return out

        return run
