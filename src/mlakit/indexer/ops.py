"""torch.library operators of the Triton kernels: `mlakit::indexer_logits`, `indexer_logits_paged`, `select_topk`."""

import torch

# Not `custom_op`: called from Python that costs 20 us a call, and this 3.5 us.
torch.library.define(
    "mlakit::indexer_logits",
    "(Tensor q, Tensor k, Tensor k_scales, Tensor weights, Tensor? k_start, Tensor? k_end) -> Tensor",
)
torch.library.define(
    "mlakit::indexer_logits_paged",
    "(Tensor q, Tensor cache, Tensor weights, Tensor block_table, Tensor context_lens, SymInt max_context_len) "
    "-> Tensor",
)
torch.library.define("mlakit::select_topk", "(Tensor logits, SymInt k, Tensor? lengths) -> Tensor")


def run_indexer_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    weights: torch.Tensor,
    k_start: torch.Tensor | None,
    k_end: torch.Tensor | None,
) -> torch.Tensor:
    """What `mlakit::indexer_logits` does, without the dispatcher."""
    from mlakit.indexer.triton_logits import launch_indexer_logits

    out = _empty_logits(q, k, k_scales, weights, k_start, k_end)
    launch_indexer_logits(q, k, k_scales, weights, k_start, k_end, out)
    return out


@torch.library.register_fake("mlakit::indexer_logits")
def _empty_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    weights: torch.Tensor,
    k_start: torch.Tensor | None,
    k_end: torch.Tensor | None,
) -> torch.Tensor:
    return q.new_empty((q.shape[0], k.shape[0]), dtype=torch.float32)


def run_indexer_logits_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
) -> torch.Tensor:
    """What `mlakit::indexer_logits_paged` does, without the dispatcher."""
    from mlakit.indexer.triton_logits import launch_indexer_logits_paged

    out = _empty_logits_paged(q, cache, weights, block_table, context_lens, max_context_len)
    launch_indexer_logits_paged(q, cache, weights, block_table, context_lens, out)
    return out


@torch.library.register_fake("mlakit::indexer_logits_paged")
def _empty_logits_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
) -> torch.Tensor:
    return q.new_empty((q.shape[0] * q.shape[1], max_context_len), dtype=torch.float32)


def run_select_topk(logits: torch.Tensor, k: int, lengths: torch.Tensor | None) -> torch.Tensor:
    """What `mlakit::select_topk` does, without the dispatcher."""
    from mlakit.indexer.triton_topk import launch_select_topk

    out = _empty_indices(logits, k, lengths)
    launch_select_topk(logits, k, lengths, out)
    return out


@torch.library.register_fake("mlakit::select_topk")
def _empty_indices(logits: torch.Tensor, k: int, lengths: torch.Tensor | None) -> torch.Tensor:
    return logits.new_empty((logits.shape[0], k), dtype=torch.int32)


for _name, _run in (
    ("indexer_logits", run_indexer_logits),
    ("indexer_logits_paged", run_indexer_logits_paged),
    ("select_topk", run_select_topk),
):
    torch.library.impl(f"mlakit::{_name}", ("cpu", "cuda"), _run)

indexer_logits = torch.ops.mlakit.indexer_logits.default
indexer_logits_paged = torch.ops.mlakit.indexer_logits_paged.default
select_topk = torch.ops.mlakit.select_topk.default
