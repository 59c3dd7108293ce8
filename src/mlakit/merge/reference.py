"""The definition of `merge_states`, in plain PyTorch."""

from collections.abc import Sequence

import torch


def merge_states_reference(
    outs: torch.Tensor | Sequence[torch.Tensor], lses: torch.Tensor | Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention results over disjoint sets of keys into the result over their union.

    Args:
        outs: [states, tokens, num_heads, dim], or a sequence of [tokens, num_heads, dim].
        lses: [states, tokens, num_heads], or a sequence of [tokens, num_heads]; natural log. Where one is -inf the
            state saw no key, and its `out` there counts for nothing, whatever it holds.

    Returns:
        out [tokens, num_heads, dim] in outs' dtype, and lse [tokens, num_heads] in lses' dtype: zeros and -inf where
        every state's lse is -inf.

    Computed in float32, or float64 if outs or lses are. Differentiable by autograd, rows without keys included.
    """
    stacked = outs if isinstance(outs, torch.Tensor) else torch.stack(list(outs))
    logs = lses if isinstance(lses, torch.Tensor) else torch.stack(list(lses))
    accumulate = torch.float64 if torch.float64 in (stacked.dtype, logs.dtype) else torch.float32
    lse_dtype = logs.dtype
    absent = logs == -torch.inf
    no_keys = absent.all(dim=0)
    # As in attention itself: -inf is taken out before the softmax, since a mask after it leaves NaN in the gradients.
    logs = logs.to(accumulate).masked_fill(no_keys, 0.0)
    weights = torch.softmax(logs, dim=0)
    values = stacked.to(accumulate).masked_fill(absent[..., None], 0.0)
    out = (weights[..., None] * values).sum(dim=0).masked_fill(no_keys[..., None], 0.0)
    lse = torch.logsumexp(logs, dim=0).masked_fill(no_keys, -torch.inf)
    return out.to(stacked.dtype), lse.to(lse_dtype)
