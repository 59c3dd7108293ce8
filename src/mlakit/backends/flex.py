"""PyTorch's FlexAttention, compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Available, Unavailable
from mlakit.backends.peers import half_only, why_not
from mlakit.backends.torch_common import TorchBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mlakit.backends.problem import Group, MLAProblem, Problem, StandardProblem
    from mlakit.hardware import DeviceInfo


class Flex(TorchBackend):
    """One call for all requests of a shape, on keys gathered from their pages. It is compiled for each shape before
    anything is timed.
    """

    name = "flex"
    summary = "PyTorch's flex_attention, compiled for each shape"
    hardware = "NVIDIA from Ampere on"
    attention = frozenset({"mla", "standard"})
    decode_mode = "mqa"
    prefill_mode = "mha"

    def availability(self, device: DeviceInfo) -> Available | Unavailable:
        """Compiling for a CPU needs a C++ compiler and takes minutes, so that is left to others."""
        if reason := why_not(device, (8, 0)):
            return Unavailable(reason)
        return super().availability(device)

    def refusal(self, problem: Problem) -> str | None:
        """Half precision."""
        return half_only(problem)

    def prepare_mqa(self, problem: MLAProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """All heads share one key: the most grouped of queries."""
        batch, rank = problem.batch, problem.dims.kv_lora_rank
        calls = [(group, batch.slots[group.keys], _compile(group, problem)) for group in batch.groups]

        def run(q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            tokens = cache.flatten(0, 1)
            for group, slots, attend in calls:
                keys = tokens[slots][:, :, None]
                out[group.rows] = attend(q[group.rows], keys, keys[..., :rank])
            return out

        return run

    def prepare_mha(self, problem: MLAProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Keys and values arrive ragged, [keys, heads, dim]."""
        calls = [(group, group.keys, _compile(group, problem)) for group in problem.batch.groups]

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            for group, at, attend in calls:
                out[group.rows] = attend(q[group.rows], k[at], v[at])
            return out

        return run

    def prepare_standard(self, problem: StandardProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Keys and values are gathered from their pages first."""
        slots = problem.batch.slots
        calls = [(group, slots[group.keys], _compile(group, problem)) for group in problem.batch.groups]

        def run(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            k_tokens, v_tokens = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
            for group, at, attend in calls:
                out[group.rows] = attend(q[group.rows], k_tokens[at], v_tokens[at])
            return out

        return run


def _compile(group: Group, problem: Problem) -> Callable[..., torch.Tensor]:
    """Attention of q [n, q_len, heads, dim] to k and v [n, kv_len, kv_heads, dim], causal bottom-right."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A process compiles a function for eight shapes and refuses more: each row starts afresh, with as many as it has.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(8, len(problem.batch.groups))
    attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    behind = group.kv_len - group.q_len
    mask = None
    if problem.causal and group.q_len > 1:

        def visible(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return query + behind >= key

        device = str(problem.device)
        mask = create_block_mask(visible, None, None, group.q_len, group.kv_len, device=device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found: Any = attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            block_mask=mask,
            scale=problem.softmax_scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        return found.transpose(1, 2)

    return attend
