"""torch.library operators of the kernels: `mlakit::indexer_logits`, `indexer_logits_paged`, `select_topk`.

`impl` "auto" takes the fastest kernel; that is found out inside the operators, where torch.compile does not look, as it
depends on addresses. For a paged cache the reference, which reads lengths, runs inside too.
"""

from collections.abc import Callable

import torch

from mlakit.dispatch import choose, choose_triton
from mlakit.indexer.hopper_config import (
    why_not_aligned,
    why_not_device,
    why_not_paged,
    why_not_rows,
    why_not_topk,
)
from mlakit.indexer.layout import SCALE_BYTES
from mlakit.indexer.reference import indexer_logits_paged_reference

_MOST_HEADS = 128

# Not `custom_op`: called from Python that costs 20 us a call, and this 3.5 us.
torch.library.define(
    "mlakit::indexer_logits",
    "(Tensor q, Tensor k, Tensor k_scales, Tensor weights, Tensor? k_start, Tensor? k_end, str impl='auto') -> Tensor",
)
torch.library.define(
    "mlakit::indexer_logits_paged",
    "(Tensor q, Tensor cache, Tensor weights, Tensor block_table, Tensor context_lens, SymInt max_context_len, "
    "str? impl=None) -> Tensor",
)
torch.library.define("mlakit::select_topk", "(Tensor logits, SymInt k, Tensor? lengths, str impl='auto') -> Tensor")


def run_indexer_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    weights: torch.Tensor,
    k_start: torch.Tensor | None,
    k_end: torch.Tensor | None,
    impl: str = "auto",
) -> torch.Tensor:
    """What `mlakit::indexer_logits` does, without the dispatcher."""
    out = _empty_logits(q, k, k_scales, weights, k_start, k_end)
    tensors = (q, k, k_scales, weights, k_start, k_end, out)
    if _is_hopper("indexer_logits", impl, q.device, lambda: why_not_rows(q, k) or why_not_aligned(q, k)):
        from mlakit.indexer.hopper_launch import launch_indexer_logits_hopper

        launch_indexer_logits_hopper(*tensors)
    else:
        from mlakit.indexer.triton_logits import launch_indexer_logits

        launch_indexer_logits(*tensors)
    return out


@torch.library.register_fake("mlakit::indexer_logits")
def _empty_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    weights: torch.Tensor,
    k_start: torch.Tensor | None,
    k_end: torch.Tensor | None,
    impl: str = "auto",
) -> torch.Tensor:
    return q.new_empty((q.shape[0], k.shape[0]), dtype=torch.float32)


def run_indexer_logits_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    impl: str | None = None,
) -> torch.Tensor:
    """What `mlakit::indexer_logits_paged` does, without the dispatcher."""
    reason = unsuitable(*q.shape[2:])
    if reason is None and (cache.stride(0) % SCALE_BYTES or cache.storage_offset() % SCALE_BYTES):
        reason = f"pages must begin at multiples of 4 bytes, got a stride of {cache.stride(0)}"
    name = choose_kernel("indexer_logits_paged", impl, q, reason)
    if name == "reference":
        return indexer_logits_paged_reference(q, cache, weights, block_table, context_lens, max_context_len)
    out = _empty_logits_paged(q, cache, weights, block_table, context_lens, max_context_len)
    tensors = (q, cache, weights, block_table, context_lens, out)
    if _is_hopper("indexer_logits_paged", name, q.device, lambda: why_not_paged(q, cache) or why_not_aligned(q, cache)):
        from mlakit.indexer.hopper_launch import launch_indexer_logits_paged_hopper

        launch_indexer_logits_paged_hopper(*tensors)
    else:
        from mlakit.indexer.triton_logits import launch_indexer_logits_paged

        launch_indexer_logits_paged(*tensors)
    return out


@torch.library.register_fake("mlakit::indexer_logits_paged")
def _empty_logits_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    impl: str | None = None,
) -> torch.Tensor:
    return q.new_empty((q.shape[0] * q.shape[1], max_context_len), dtype=torch.float32)


def run_select_topk(logits: torch.Tensor, k: int, lengths: torch.Tensor | None, impl: str = "auto") -> torch.Tensor:
    """What `mlakit::select_topk` does, without the dispatcher."""
    out = _empty_indices(logits, k, lengths)
    if _is_hopper("select_topk", impl, logits.device, lambda: why_not_topk(logits.shape[1], k)):
        from mlakit.indexer.hopper_launch import launch_select_topk_hopper

        launch_select_topk_hopper(logits, k, lengths, out)
    else:
        from mlakit.indexer.triton_topk import launch_select_topk

        launch_select_topk(logits, k, lengths, out)
    return out


@torch.library.register_fake("mlakit::select_topk")
def _empty_indices(logits: torch.Tensor, k: int, lengths: torch.Tensor | None, impl: str = "auto") -> torch.Tensor:
    return logits.new_empty((logits.shape[0], k), dtype=torch.int32)


def choose_kernel(operation: str, impl: str | None, tensor: torch.Tensor, reason: str | None) -> str:
    """The implementation's name, or "auto" for the fastest kernel, which the operator finds out. `reason`: why the
    portable kernel cannot run; the one for Hopper takes less.
    """
    if impl == "hopper":
        return impl  # the operator says why not
    if impl not in (None, "triton", "reference"):
        return choose(operation, impl, dict.fromkeys(("hopper", "triton", "reference")))
    name = choose_triton(operation, impl, tensor, reason)
    return "auto" if name == "triton" and impl is None else name


def unsuitable(heads: int, dim: int) -> str | None:
    """Why the kernels cannot score queries of these sizes; None if they can."""
    if not 1 <= heads <= _MOST_HEADS:
        return f"heads must be from 1 to {_MOST_HEADS}, got {heads}"
    if dim not in (32, 64, 128):
        return f"dim must be 32, 64 or 128, got {dim}"
    return None


def _is_hopper(operation: str, impl: str, device: torch.device, why_not: Callable[[], str | None]) -> bool:
    """Whether the Hopper kernel runs.

    Raises:
        RuntimeError: it was asked for and cannot.
    """
    if impl == "triton":
        return False
    reason = why_not_device(str(device)) or why_not()
    if impl == "hopper" and reason is not None:
        raise RuntimeError(f"{operation}: impl='hopper' cannot run: {reason}")
    return reason is None


for _name, _run in (
    ("indexer_logits", run_indexer_logits),
    ("indexer_logits_paged", run_indexer_logits_paged),
    ("select_topk", run_select_topk),
):
    torch.library.impl(f"mlakit::{_name}", ("cpu", "cuda"), _run)

indexer_logits = torch.ops.mlakit.indexer_logits.default
indexer_logits_paged = torch.ops.mlakit.indexer_logits_paged.default
select_topk = torch.ops.mlakit.select_topk.default
