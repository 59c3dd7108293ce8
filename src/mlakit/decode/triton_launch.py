"""Launch configurations of the Triton decode kernels, chosen by one function, and the launcher."""

from dataclasses import dataclass

import torch
import triton

from mlakit.decode.triton_combine import _mla_decode_combine_kernel
from mlakit.decode.triton_decode import _mla_decode_kernel, _mla_decode_transposed_kernel
from mlakit.decode.triton_schedule import Plan, plan_pieces
from mlakit.hardware import device_info

LOG2E = 1.4426950408889634
# A piece of fewer keys costs more to start and to merge than its keys cost to read.
MIN_PIECE_KEYS = 64


@dataclass(frozen=True)
class DecodeConfig:
    """How a decode kernel is launched."""

    block_m: int  # query rows (new tokens x heads) a program
    block_n: int  # keys a step
    transposed: bool  # keys, not query rows, on the M side of the matrix instructions
    num_warps: int
    num_stages: int
    resident: int  # programs that fit a multiprocessor at once

    def shared_bytes(self, kv_lora_rank: int, rope_dim: int, item_bytes: int) -> int:
        """An upper estimate of the shared memory of a program: key stages, the queries, the weights, and 2 KiB for
        reductions.
        """
        buffers = self.num_stages if self.uses_wgmma else max(self.num_stages - 1, 1)
        staged = kv_lora_rank if self.transposed else kv_lora_rank + rope_dim
        keys = buffers * self.block_n * staged + (self.block_n * rope_dim if self.transposed else 0)
        return item_bytes * (keys + self.block_m * (kv_lora_rank + rope_dim + self.block_n)) + 2048

    @property
    def uses_wgmma(self) -> bool:
        """True if the shapes suit Hopper's warpgroup instructions, whose operands Triton keeps one stage longer."""
        return (self.block_n if self.transposed else self.block_m) >= 64


def shared_limit(capability: tuple[int, int]) -> int:
    """Shared memory of one program, in bytes (CUDA C++ Programming Guide, table of technical specifications by
    compute capability).
    """
    if capability in ((8, 0), (8, 7)):
        return 163 * 1024
    if capability[0] in (9, 10, 11):
        return 227 * 1024
    return 99 * 1024


def choose_config(
    *, rows: int, kv_lora_rank: int, rope_dim: int, item_bytes: int, capability: tuple[int, int] | None
) -> DecodeConfig:
    """The launch configuration for `rows` query rows a request; None as capability is the interpreter."""
    capability = capability or (8, 0)
    config = _preferred(rows, capability)
    if config.block_m * kv_lora_rank > 4096 * config.num_warps:  # 128 accumulators a thread
        config = DecodeConfig(16, 32, False, 8, 3, 1)
    limit = shared_limit(capability)
    while config.shared_bytes(kv_lora_rank, rope_dim, item_bytes) * config.resident > limit - 1024 * (
        config.resident - 1
    ):
        config = _smaller(config)
    return config


def _preferred(rows: int, capability: tuple[int, int]) -> DecodeConfig:
    # Chosen by arithmetic on registers, shared memory and bytes in flight, and by the SASS; not measured on a GPU yet
    # (benchmarks/h200/decode.py --tune does that, the transposed form included).
    hopper = capability[0] == 9
    if rows <= 16 or shared_limit(capability) < 128 * 1024:
        return DecodeConfig(16, 32, False, 4, 3, 2 if shared_limit(capability) > 200 * 1024 else 1)
    if rows <= 32 or not hopper:
        return DecodeConfig(32, 32, False, 8, 5 if shared_limit(capability) > 200 * 1024 else 3, 1)
    return DecodeConfig(64, 32, False, 8, 4, 1)


def _smaller(config: DecodeConfig) -> DecodeConfig:
    """The next smaller configuration where one does not fit: fewer resident programs, then stages, then keys, then
    rows.
    """
    m, n, stages, resident = config.block_m, config.block_n, config.num_stages, config.resident
    if resident > 1:
        resident -= 1
    elif stages > 2:
        stages -= 1
    elif n > 16:
        n //= 2
    elif m > 16:
        m //= 2
    else:
        raise ValueError("no launch configuration of mla_decode fits this GPU's shared memory at these dimensions")
    return DecodeConfig(m, n, config.transposed, config.num_warps, stages, resident)


def _launch_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    kv_lora_rank: int,
    num_splits: int | None,
    config: DecodeConfig | None = None,
) -> None:
    """Fill `out` and `lse`. Inputs are valid already; the workspace comes from the caching allocator, so that a CUDA
    graph owns its own.
    """
    batch, q_len, heads, latent_dim = q.shape
    rows = q_len * heads
    if batch == 0:
        return
    rope_dim = latent_dim - kv_lora_rank
    device = device_info(q.device)
    config = config or choose_config(
        rows=rows,
        kv_lora_rank=kv_lora_rank,
        rope_dim=rope_dim,
        item_bytes=q.element_size(),
        capability=device.capability,
    )
    row_tiles = triton.cdiv(rows, config.block_m)
    page_size = cache.shape[1]
    capacity = block_table.shape[1] * page_size
    min_tiles = max(1, MIN_PIECE_KEYS // config.block_n)
    plan = plan_pieces(
        batch=batch,
        row_tiles=row_tiles,
        capacity=capacity,
        block_n=config.block_n,
        resident=device.units * config.resident,
        min_tiles=min_tiles,
        num_splits=num_splits,
    )
    partial, partial_lse = _workspace(q, plan, row_tiles * config.block_m, kv_lora_rank, out, lse)
    # From sm_90 on the combine grid may be brought up while the attention grid drains.
    dependent = plan.is_split and device.capability is not None and device.capability[0] >= 9
    shared = {
        "BALANCED": plan.splits is None,
        "BLOCK_B": max(16, triton.next_power_of_2(batch)) if plan.splits is None else 16,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "MIN_TILES": min_tiles,
        "RANK": kv_lora_rank,
        "DEPENDENT": dependent,
    }
    kernel = _mla_decode_transposed_kernel if config.transposed else _mla_decode_kernel
    kernel[(plan.slots * row_tiles,)](
        q,
        cache,
        block_table,
        seq_lens,
        out,
        lse,
        partial,
        partial_lse,
        softmax_scale * LOG2E,
        *q.stride()[:3],
        *cache.stride()[:2],
        block_table.stride(0),
        *out.stride()[:3],
        batch,
        q_len,
        heads,
        row_tiles,
        plan.slots,
        plan.splits or 0,
        capacity,
        CAUSAL=causal and q_len > 1,
        PAGE_SIZE=page_size,
        ROPE=rope_dim,
        SPLIT=plan.is_split,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **shared,
    )
    if not plan.is_split:
        return
    most = plan.splits or plan.slots - batch + 1
    block_p = min(64, max(2, triton.next_power_of_2(most)))
    block_c = min(128, kv_lora_rank)
    _mla_decode_combine_kernel[(batch * rows, kv_lora_rank // block_c)](
        partial,
        partial_lse,
        seq_lens,
        out,
        lse,
        *out.stride()[:3],
        batch,
        heads,
        rows,
        row_tiles,
        plan.slots,
        plan.splits or 0,
        capacity,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
        **shared,
        **({"launch_pdl": True} if dependent else {}),
    )


def _workspace(
    q: torch.Tensor, plan: Plan, rows: int, kv_lora_rank: int, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if not plan.is_split:
        return out, lse  # never touched; a kernel argument needs some pointer
    partial = torch.empty((plan.slots, rows, kv_lora_rank), dtype=torch.float32, device=q.device)
    return partial, torch.empty((plan.slots, rows), dtype=torch.float32, device=q.device)
