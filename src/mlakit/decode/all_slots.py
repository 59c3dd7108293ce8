"""Dense decode by sparse attention that is told every slot: many heads over the float8 cache of 656 bytes a token.

The dense kernel (`hopper_fp8_rows`) turns the keys into float16 again for every 16 query rows, the sparse one for every
64 heads. Sparse attention needs its slots in memory, and does not know of tables that are too short.
"""

import torch

from mlakit.sparse import mla_sparse_decode


def is_faster(q: torch.Tensor, cache: torch.Tensor, block_table: torch.Tensor, num_splits: int | None) -> bool:
    """Is it faster than the dense kernel? Never said where pieces are named: results must not depend on the batch then.

    Measured on an H200, requests x heads x keys, microseconds of the dense kernel and the sparse one: 128x32x8192 353
    and 399, 64x64x4096 186 and 124, 32x128x4096 184 and 118, 128x128x8192 1334 and 746; but 16x128x1024 37 and 32,
    4x128x4096 37 and 31, 1x128x8192 26 and 30, where making slots takes as long as is won. Four tokens of 16 heads,
    64x16x4096: 188 and 372.
    """
    batch, q_len, heads, _ = q.shape
    work = batch * q_len * -(-heads // 64) * block_table.shape[1] * cache.shape[1]
    return num_splits is None and heads > 32 and work >= 2**17


def decode_all_slots(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
) -> None:
    """Fill `out` and `lse`, without waiting for the device. Inputs are valid already."""
    from mlakit.decode.triton_all_slots import _launch_all_slots, _launch_finish  # importing mlakit loads no triton

    if any(stride % 8 for stride in q.stride()[:3]) or q.data_ptr() % 16:
        q = q.clone(memory_format=torch.contiguous_format)
    (batch, q_len), page_size = q.shape[:2], cache.shape[1]
    capacity = block_table.shape[1] * page_size
    slots = torch.empty((batch, 1, capacity), dtype=torch.int32, device=q.device)
    seen = torch.empty((batch, q_len), dtype=torch.int32, device=q.device)
    _launch_all_slots(block_table, seq_lens, slots, seen, page_size=page_size, causal=causal)
    _, logs = mla_sparse_decode(
        q,
        cache,
        slots.expand(-1, q_len, -1),
        softmax_scale=softmax_scale,
        kv_lora_rank=out.shape[-1],
        topk_length=seen,
        out=out,
    )
    _launch_finish(seq_lens, logs, out, lse, capacity=capacity)
