"""torch.library operators of the Triton kernel: `mlakit::concat_k` and `mlakit::concat_k_out`."""

from typing import Any

import torch

# `torch.library.define` and not `custom_op`: called from Python, the latter costs 20 us a call and this 3.5 us (no
# gradient asked for), beside a kernel of 5 us.
torch.library.define("mlakit::concat_k", "(Tensor k_nope, Tensor k_pe) -> Tensor")
torch.library.define("mlakit::concat_k_out", "(Tensor k_nope, Tensor k_pe, Tensor(a!) out) -> ()")


def run_concat_k(k_nope: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    """What `mlakit::concat_k` does, without the dispatcher."""
    from mlakit.concat.triton_concat import launch_concat

    out = k_nope.new_empty((*k_nope.shape[:-1], k_nope.shape[-1] + k_pe.shape[-1]))
    launch_concat(k_nope, k_pe, out)
    return out


def run_concat_k_out(k_nope: torch.Tensor, k_pe: torch.Tensor, out: torch.Tensor) -> None:
    """What `mlakit::concat_k_out` does, without the dispatcher."""
    from mlakit.concat.triton_concat import launch_concat

    launch_concat(k_nope, k_pe, out)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


torch.library.impl("mlakit::concat_k", ("cpu", "cuda"), run_concat_k)
torch.library.impl("mlakit::concat_k_out", ("cpu", "cuda"), run_concat_k_out)


@torch.library.register_fake("mlakit::concat_k")
def _empty_keys(k_nope: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    return k_nope.new_empty((*k_nope.shape[:-1], k_nope.shape[-1] + k_pe.shape[-1]))


@torch.library.register_fake("mlakit::concat_k_out")
def _(k_nope: torch.Tensor, k_pe: torch.Tensor, out: torch.Tensor) -> None:
    return None


def _save_width(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.nope = inputs[0].shape[-1]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The shared row was used by every head; PyTorch's sum accumulates in float32.
    return grad[..., : ctx.nope], grad[..., ctx.nope :].sum(dim=-2, keepdim=True)


torch.library.register_autograd("mlakit::concat_k", _backward, setup_context=_save_width)

concat_k = torch.ops.mlakit.concat_k.default
concat_k_out = torch.ops.mlakit.concat_k_out.default
