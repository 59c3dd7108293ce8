"""Dense decode by sparse attention that is told every slot: for the float8 cache of 656 bytes a token, on Hopper.

The dense kernel in Gluon (`hopper_fp8_rows`) turns the keys into float16 again for every 16 query rows, the sparse one
for every 64 heads; and the portable sparse kernel has a form of its own for Hopper's matrix instructions. Sparse
attention needs its slots in memory, and does not know of tables that are too short.
"""

import torch

from mlakit.hardware import capability
from mlakit.sparse import mla_sparse_decode


def is_faster(
    impl: str,
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    num_splits: int | None,
) -> bool:
    """Is it faster than the dense kernel of `impl`? Never said where pieces are named: results must not depend on the
    batch then.

    Measured on an H200, requests x heads x keys, microseconds of the dense kernel and of the sparse one with all that
    is around it. In Gluon: 32x32x4096 58 and 78, 32x48x4096 86 and 79, 32x64x4096 100 and 80, 128x128x8192 1330 and
    751; of less work 8x64x4096 36 and 38, 16x128x1024 36 and 36. Its pieces are not balanced: 64x128x4096 takes 349 and
    212, lengths of 4096 on average in tables for 8192 340 and 386. Portable: 8x16x4096 48 and 37, 128x16x8192 1025 and
    502, 128x128x8192 1871 and 989; but 1x16x8192 21 and 26, and four tokens of 16 heads, which share a tile of the
    dense kernel, 149 and 264. Launched as on GPUs of capability 8.0, without the form for Hopper, 128x16x8192 1306 and
    1453, 32x128x4096 759 and 1517.
    """
    batch, q_len, heads, _ = q.shape
    tiles = q_len * -(-heads // 64)
    work = batch * tiles * block_table.shape[1] * cache.shape[1]
    if num_splits is not None or work < 2**15:
        return False
    if impl == "hopper":  # sparse attention in Gluon takes no `out` whose heads are further apart
        return heads > 32 and work >= 2**17 and out.stride(2) < 2**24
    if impl == "triton" and tiles == -(-q_len * heads // 64) and out.shape[3] == 512:
        return capability(q.device) == (9, 0)
    return False


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
    impl: str,
) -> None:
    """Fill `out` and `lse` by sparse attention's `impl`, without waiting for the device. Inputs are valid already."""
    from mlakit.decode.triton_all_slots import _launch_all_slots, _launch_finish  # importing mlakit loads no triton

    if impl == "hopper" and (any(stride % 8 for stride in q.stride()[:3]) or q.data_ptr() % 16):
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
        impl=impl,
    )
    _launch_finish(seq_lens, logs, out, lse, capacity=capacity)
