"""Launching the Hopper kernel of `mla_prefill`: what it takes, and how."""

from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlakit.hardware import device_info
from mlakit.prefill.hopper_config import BLOCK_M, HopperConfig, hopper_config, key_parts
from mlakit.prefill.hopper_forward import _prefill_hopper_kernel
from mlakit.prefill.triton_tiles import heads_in_l2

_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_SCHEDULES = {"grid": 0, "strided": 0, "snake": 1, "dynamic": 2}


def _launch_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    k_pe: torch.Tensor | None = None,
    config: HopperConfig | None = None,
    heads_at_once: int | None = None,
) -> None:
    """Fill `out` and `lse`. Inputs are as `mla_prefill` has checked them. `heads_at_once` is there for measuring."""
    total_q, num_heads, qk_dim = q.shape
    if total_q == 0:
        return
    v_dim = v.shape[-1]
    config = config or hopper_config(qk_dim, v_dim)
    batch = cu_seqlens_q.numel() - 1
    groups = num_heads // k.shape[1]
    # The keys' columns come in two parts; where they are one tensor, the second begins behind the first.
    dim0, dim1 = key_parts(k, k_pe)
    if k_pe is not None:
        rest, column, stride_r = k_pe, 0, 0 if k_pe.shape[1] == 1 else k_pe.stride(1)
    else:
        rest, column, stride_r = k, dim0 if dim1 else 0, k.stride(1)
    tiles = total_q // BLOCK_M + batch + 1
    grid = tiles * num_heads
    if config.schedule != "grid":
        grid = min(grid, device_info(q.device).units)
    if heads_at_once is None:
        heads_at_once = groups * heads_in_l2(k.shape[1], k.shape[0], batch, (qk_dim + v_dim) * k.element_size())
    _prefill_hopper_kernel[(grid,)](
        _descriptor(q, 64, dim0),
        _descriptor(q, 64, dim1 or 64),
        _descriptor(k, config.block_n, dim0),
        _descriptor(rest, config.block_n, dim1 or 64),
        _descriptor(v, config.block_n, v_dim),
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        _counters(q.device) if config.schedule == "dynamic" else cu_seqlens_q,
        total_q,
        batch,
        tiles,
        num_heads,
        heads_at_once,
        softmax_scale * 1.4426950408889634,
        q.stride(1),
        k.stride(1),
        stride_r,
        column,
        v.stride(1),
        out.stride(0),
        out.stride(1),
        GROUPS=groups,
        CAUSAL=causal,
        BLOCK_N=config.block_n,
        D0=dim0,
        D1=dim1,
        DV=v_dim,
        STAGES=config.stages,
        SCHEDULE=_SCHEDULES[config.schedule],
        TURNS=config.turns,
        CONSUMER_REGS=config.consumer_regs,
        PRODUCER_REGS=config.producer_regs,
        num_warps=4,
    )


def _descriptor(x: torch.Tensor, rows: int, cols: int) -> Any:
    # Heads lie along the columns, whatever their stride: head h starts at column h * stride(1).
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    stride = x.stride(0) if x.shape[0] > 1 else -(-width // 8) * 8
    return TensorDescriptor(x, [x.shape[0], width], [stride, 1], [rows, cols], _LAYOUT)


_tickets: dict[tuple[int | None, int], torch.Tensor] = {}


def _counters(device: torch.device) -> torch.Tensor:
    """Two zeros for a launch on the current stream, which leaves them as zeros for the next."""
    if device.type != "cuda":
        return torch.zeros(2, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        # Graphs captured on one stream may be replayed on several at once: each launch gets counters of its own.
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    if key not in _tickets:
        _tickets[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _tickets[key]
