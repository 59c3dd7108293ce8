"""PyTorch's scaled_dot_product_attention, which picks its own kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.torch_common import TorchBackend, hidden_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mlakit.backends.problem import Group, MLAProblem, Problem, StandardProblem


class SDPA(TorchBackend):
    """One SDPA call for all requests of a shape."""

    name = "sdpa"
    summary = "PyTorch's scaled_dot_product_attention"
    attention = frozenset({"mla", "standard"})
    decode_mode = "mqa"
    prefill_mode = "mha"

    def prepare_mqa(self, problem: MLAProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Heads become rows of one query, as no SDPA kernel shares a key of 576 among heads without copying it."""
        import torch

        batch, dims = problem.batch, problem.dims
        rank, heads, scale = dims.kv_lora_rank, dims.num_heads, problem.softmax_scale
        plans = []
        for group in batch.groups:
            visible = _visible(group, problem)
            # Rows are (token, head) pairs: every head of a token sees the same keys.
            mask = None if visible is None else visible.repeat_interleave(heads, dim=0)
            plans.append((group, batch.slots[group.keys], mask))

        def run(q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            tokens = cache.flatten(0, 1)
            for group, slots, mask in plans:
                keys = tokens[slots][:, None]
                rows = q[group.rows].flatten(1, 2)[:, None]
                found = torch.nn.functional.scaled_dot_product_attention(
                    rows, keys, keys[..., :rank], attn_mask=mask, scale=scale
                )
                out[group.rows] = found.view(*group.rows.shape, heads, rank)
            return out

        return run

    def prepare_mha(self, problem: MLAProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Keys and values arrive ragged, [keys, heads, dim]."""
        plans = [(group, group.keys, _causality(group, problem)) for group in problem.batch.groups]

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            for group, at, causality in plans:
                out[group.rows] = _attend(q[group.rows], k[at], v[at], causality, problem.softmax_scale)
            return out

        return run

    def prepare_standard(self, problem: StandardProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Keys and values are gathered from their pages first."""
        slots = problem.batch.slots
        plans = [(group, slots[group.keys], _causality(group, problem)) for group in problem.batch.groups]

        def run(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            k_tokens, v_tokens = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
            for group, at, causality in plans:
                out[group.rows] = _attend(q[group.rows], k_tokens[at], v_tokens[at], causality, problem.softmax_scale)
            return out

        return run


def _visible(group: Group, problem: Problem) -> torch.Tensor | None:
    """Mask [q_len, kv_len] of the keys that a query token sees, or None for all."""
    hidden = hidden_keys(group, problem)
    return None if hidden is None else hidden.logical_not()


def _causality(group: Group, problem: Problem) -> dict[str, Any]:
    # SDPA's is_causal aligns top-left: right for a whole prefill only. Anything shorter takes a mask.
    if problem.causal and group.q_len == group.kv_len:
        return {"is_causal": True}
    return {"attn_mask": _visible(group, problem)}


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causality: dict[str, Any], scale: float) -> torch.Tensor:
    """Q [n, q_len, heads, dim], k and v [n, kv_len, kv_heads, dim]: [n, q_len, heads, v_dim]."""
    import torch

    found = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
        **causality,
    )
    return found.transpose(1, 2)
