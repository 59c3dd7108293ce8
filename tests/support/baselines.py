"""Layers as `mlakit study fast-path --baseline tests.support.baselines:deepseek` takes them."""

from typing import Any

import torch

from tests.support.deepseek_layer import DeepSeekMLA


def deepseek(args: Any) -> DeepSeekMLA:
    """DeepSeek's own layer, naive."""
    return DeepSeekMLA(args, "naive")


class _Forgetful(DeepSeekMLA):
    def forward(self, x, start_pos, freqs_cis, mask) -> torch.Tensor:
        return super().forward(x, start_pos, freqs_cis, None)


def forgetful(args: Any) -> DeepSeekMLA:
    """The same, but it forgets the mask."""
    return _Forgetful(args, "naive")
