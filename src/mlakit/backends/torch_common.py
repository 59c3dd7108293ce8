"""What the backends in plain PyTorch share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlakit.backends.base import Available, Backend, Unavailable

if TYPE_CHECKING:
    import torch

    from mlakit.backends.problem import Group, Problem
    from mlakit.hardware import DeviceInfo


class TorchBackend(Backend):
    """Runs wherever PyTorch does."""

    def availability(self, device: DeviceInfo) -> Available | Unavailable:
        """PyTorch is always there."""
        import torch

        return Available(f"torch {torch.__version__}")


def hidden_keys(group: Group, problem: Problem) -> torch.Tensor | None:
    """Mask [q_len, kv_len] of the keys that a causal query token must not see (bottom-right); None if it sees all."""
    import torch

    if not problem.causal or group.q_len == 1:
        return None
    shape = (group.q_len, group.kv_len)
    visible = torch.ones(shape, dtype=torch.bool, device=problem.device).tril_(group.kv_len - group.q_len)
    return visible.logical_not_()
