"""`mlakit::merge_stacked` and `mlakit::merge_separate` as torch.library operators; Triton is imported when one first
runs.
"""

import torch

MAX_SEPARATE = 8  # tensors that the kernel takes as arguments of their own


def run_stacked(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge outs [states, tokens, num_heads, dim] by lses [states, tokens, num_heads]."""
    from mlakit.merge.triton_merge import _launch_merge_stacked

    out, lse = _empty(outs[0])
    _launch_merge_stacked(outs, lses, out, lse)
    return out, lse


merge_stacked = torch.library.custom_op("mlakit::merge_stacked", run_stacked, mutates_args=())


@merge_stacked.register_fake
def _(outs, lses):
    return _empty(outs[0])


def run_separate(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge up to MAX_SEPARATE states, each in tensors of its own: no copy is made to stack them."""
    from mlakit.merge.triton_merge import _launch_merge_separate

    out, lse = _empty(outs[0])
    _launch_merge_separate(outs, lses, out, lse)
    return out, lse


merge_separate = torch.library.custom_op("mlakit::merge_separate", run_separate, mutates_args=())


@merge_separate.register_fake
def _(outs, lses):
    return _empty(outs[0])


def _empty(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return like.new_empty(like.shape), like.new_empty(like.shape[:2], dtype=torch.float32)


def _state_gradient(
    out_i: torch.Tensor,
    lse_i: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With w = exp(lse_i - lse): d out_i = w dout, and d lse_i = w (dout . (out_i - out) + dlse)."""
    absent = lse_i == -torch.inf
    weight = torch.exp(lse_i - lse.masked_fill(lse == -torch.inf, 0.0))  # absent states have weight 0, also if all are
    dlog = torch.zeros_like(lse_i) if dlse is None else weight * dlse
    if dout is None:
        return torch.zeros_like(out_i), dlog
    away = (out_i.float() - out.float()).masked_fill(absent[..., None], 0.0)
    dlog = dlog + weight * (dout.float() * away).sum(dim=-1)
    return (weight[..., None] * dout.float()).to(out_i.dtype), dlog


def _setup_stacked(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _backward_stacked(ctx, dout, dlse):
    if dout is None and dlse is None:
        return None, None
    outs, lses, out, lse = ctx.saved_tensors
    # One state at a time, so that no temporary has the size of all of them.
    pairs = [_state_gradient(o, s, out, lse, dout, dlse) for o, s in zip(outs.unbind(0), lses.unbind(0), strict=True)]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def _setup_separate(ctx, inputs, output):
    outs, lses = inputs
    ctx.states = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)
    ctx.set_materialize_grads(False)


def _backward_separate(ctx, dout, dlse):
    n = ctx.states
    if dout is None and dlse is None:
        return [None] * n, [None] * n
    *states, out, lse = ctx.saved_tensors
    pairs = [_state_gradient(o, s, out, lse, dout, dlse) for o, s in zip(states[:n], states[n:], strict=True)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


merge_stacked.register_autograd(_backward_stacked, setup_context=_setup_stacked)
merge_separate.register_autograd(_backward_separate, setup_context=_setup_separate)
