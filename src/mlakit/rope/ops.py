"""torch.library operators of the Triton kernel: `mlakit::apply_rope`, `mlakit::apply_rope_out` and the one in place,
`mlakit::apply_rope_`.
"""

from collections.abc import Hashable
from typing import Any

import torch

# `torch.library.define` and not `custom_op`, which costs 20 us a call where this costs 3.5 us. The rotation in place
# has a name of its own: as `apply_rope_out` with x for `out`, an argument that is only read would change too.
torch.library.define(
    "mlakit::apply_rope",
    "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, str layout, bool inverse) -> Tensor",
)
torch.library.define(
    "mlakit::apply_rope_out",
    "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, str layout, Tensor(a!) out) -> ()",
)
torch.library.define(
    "mlakit::apply_rope_", "(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions, str layout) -> ()"
)


def run_apply_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    layout: str,
    inverse: bool,
    key: Hashable = None,
) -> torch.Tensor:
    """What `mlakit::apply_rope` does, without the dispatcher. `inverse` turns by the opposite angles; `key` is
    `launch_rope`'s.
    """
    from mlakit.rope.triton_rope import launch_rope

    out = x.new_empty(x.shape)
    launch_rope(x, cos, sin, positions, out, layout=layout, inverse=inverse, key=key)
    return out


def run_apply_rope_out(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    layout: str,
    out: torch.Tensor,
    key: Hashable = None,
) -> None:
    """What `mlakit::apply_rope_out` does, without the dispatcher; `key` is `launch_rope`'s."""
    from mlakit.rope.triton_rope import launch_rope

    launch_rope(x, cos, sin, positions, out, layout=layout, key=key)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def run_apply_rope_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, layout: str
) -> None:
    """What `mlakit::apply_rope_` does, without the dispatcher."""
    run_apply_rope_out(x, cos, sin, positions, layout, x)


torch.library.impl("mlakit::apply_rope", ("cpu", "cuda"), run_apply_rope)
torch.library.impl("mlakit::apply_rope_out", ("cpu", "cuda"), run_apply_rope_out)
torch.library.impl("mlakit::apply_rope_", ("cpu", "cuda"), run_apply_rope_)


@torch.library.register_fake("mlakit::apply_rope")
def _(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    layout: str,
    inverse: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("mlakit::apply_rope_out")
def _(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    layout: str,
    out: torch.Tensor,
) -> None:
    return None


@torch.library.register_fake("mlakit::apply_rope_")
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, layout: str) -> None:
    return None


def _save_angles(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, positions, ctx.layout, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # A rotation's transpose turns back. What comes from a sum over heads is expanded, with stride 0 everywhere.
    cos, sin, positions = ctx.saved_tensors
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return apply_rope(grad, cos, sin, positions, ctx.layout, not ctx.inverse), None, None, None, None, None


torch.library.register_autograd("mlakit::apply_rope", _backward, setup_context=_save_angles)

apply_rope = torch.ops.mlakit.apply_rope.default
apply_rope_out = torch.ops.mlakit.apply_rope_out.default
apply_rope_ = torch.ops.mlakit.apply_rope_.default
