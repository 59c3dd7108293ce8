"""torch.library operators: `mlakit::append_latent` (writes to `cache`) and `mlakit::gather_latent`.

The implementation is chosen inside of them, where torch.compile does not look: it depends on addresses, and the
references read lengths.
"""

import torch

from mlakit.cache.layout import fp8_row_bytes
from mlakit.cache.reference import append_latent_reference, gather_latent_reference
from mlakit.dispatch import choose_triton, misplaced_row

# Not `custom_op`: called from Python that costs 20 us a call, and this 3.5 us. `Tensor(a!)` declares what is written.
torch.library.define(
    "mlakit::append_latent",
    "(Tensor kv, Tensor norm_weight, Tensor cos, Tensor sin, Tensor(a!) cache, Tensor slot_mapping, Tensor? positions, "
    "float eps, str rope_layout, str? scale_fmt, str? impl=None) -> ()",
)
torch.library.define(
    "mlakit::gather_latent",
    "(Tensor cache, Tensor block_table, Tensor cu_seqlens, SymInt total, Tensor? starts, int kv_lora_rank, "
    "ScalarType dtype, str? impl=None) -> Tensor",
)


def run_append_latent(
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    rope_layout: str,
    scale_fmt: str | None,
    impl: str | None = None,
) -> None:
    """What `mlakit::append_latent` does, without the dispatcher."""
    reason = f"it takes no {kv.dtype}" if kv.dtype == torch.float64 else misplaced_row(cache)
    inputs = (kv, norm_weight, cos, sin, cache, slot_mapping)
    if choose_triton("append_latent", impl, kv, reason) == "triton":
        from mlakit.cache.triton_append import launch_append

        interleaved, ue8m0 = rope_layout == "interleaved", scale_fmt == "ue8m0"
        launch_append(*inputs, positions, eps=eps, interleaved=interleaved, ue8m0=ue8m0)
    else:
        append_latent_reference(*inputs, positions=positions, eps=eps, rope_layout=rope_layout, scale_fmt=scale_fmt)
    if not cache.is_inference():
        torch.autograd.graph.increment_version(cache)


@torch.library.register_fake("mlakit::append_latent")
def _(
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    rope_layout: str,
    scale_fmt: str | None,
    impl: str | None = None,
) -> None:
    return None


def run_gather_latent(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    total: int,
    starts: torch.Tensor | None,
    kv_lora_rank: int,
    dtype: torch.dtype,
    impl: str | None = None,
) -> torch.Tensor:
    """What `mlakit::gather_latent` does, without the dispatcher."""
    if choose_triton("gather_latent", impl, cache, misplaced_row(cache)) == "reference":
        return gather_latent_reference(
            cache, block_table, cu_seqlens, total, starts=starts, kv_lora_rank=kv_lora_rank, dtype=dtype
        )
    from mlakit.cache.triton_gather import launch_gather

    out = _empty_rows(cache, block_table, cu_seqlens, total, starts, kv_lora_rank, dtype)
    launch_gather(cache, block_table, cu_seqlens, starts, out, kv_lora_rank=kv_lora_rank)
    return out


@torch.library.register_fake("mlakit::gather_latent")
def _empty_rows(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    total: int,
    starts: torch.Tensor | None,
    kv_lora_rank: int,
    dtype: torch.dtype,
    impl: str | None = None,
) -> torch.Tensor:
    width = cache.shape[2]
    if cache.dtype == torch.uint8:
        width = kv_lora_rank + (width - fp8_row_bytes(kv_lora_rank, 0)) // 2
    return cache.new_empty((total, width), dtype=dtype)


torch.library.impl("mlakit::append_latent", ("cpu", "cuda"), run_append_latent)
torch.library.impl("mlakit::gather_latent", ("cpu", "cuda"), run_gather_latent)

append_latent = torch.ops.mlakit.append_latent.default
gather_latent = torch.ops.mlakit.gather_latent.default
