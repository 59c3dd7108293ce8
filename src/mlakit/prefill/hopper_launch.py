"""Launching the Hopper kernel of `mla_prefill`."""

import torch

from mlakit.hardware import device_info
from mlakit.hopper_descriptors import descriptor_of_heads
from mlakit.prefill.hopper_config import BLOCK_M, HopperConfig, hopper_config, key_parts
from mlakit.prefill.hopper_forward import _prefill_hopper_kernel
from mlakit.triton_launch import LOG2E, Launches
from mlakit.triton_ragged import heads_in_l2

_LAUNCHES = Launches(_prefill_hopper_kernel)


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
    if q.shape[0] == 0:
        return
    if config is None:
        config = hopper_config(q.shape[2], v.shape[2])
    # The keys' columns come in two parts; where they are one tensor, the second begins behind the first.
    dim0, dim1 = key_parts(k, k_pe)
    rest = k if k_pe is None else k_pe
    n, v_dim = config.block_n, v.shape[2]
    tensors = (
        descriptor_of_heads(q, 64, dim0),
        descriptor_of_heads(q, 64, dim1 or 64),
        descriptor_of_heads(k, n, dim0),
        descriptor_of_heads(rest, n, dim1 or 64),
        descriptor_of_heads(v, n, v_dim),
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        _counters(q.device),
    )
    key = (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), rest.shape, rest.stride(), out.stride(),
        cu_seqlens_q.shape, q.dtype, softmax_scale, causal, config, heads_at_once,
    )  # fmt: skip
    if q.is_cuda and _LAUNCHES.again(key, q.device, tensors):
        return

    total_q, num_heads, qk_dim = q.shape
    keys, kv_heads, _ = k.shape
    batch = cu_seqlens_q.shape[0] - 1
    groups = num_heads // kv_heads
    tiles = total_q // BLOCK_M + batch + 1
    units = device_info(q.device).units
    if heads_at_once is None:
        heads_at_once = groups * heads_in_l2(kv_heads, keys, batch, (qk_dim + v_dim) * k.element_size())
        if not causal:
            # Tiles are alike then, and a round of them is enough. One H200, 1x1024 tokens, 128 heads: 599 TFLOP/s with
            # 16 heads at once, 561 with the 36 that fit L2. Causal tiles differ, and the short ones fill gaps.
            heads_at_once = min(heads_at_once, groups * -(-units // (groups * max(total_q // BLOCK_M, 1))))
    constants = {
        "GROUPS": groups,
        "CAUSAL": causal,
        "BLOCK_N": n,
        "D0": dim0,
        "D1": dim1,
        "DV": v_dim,
        "STAGES": config.stages,
        "CONSUMER_REGS": config.consumer_regs,
        "PRODUCER_REGS": config.producer_regs,
        "num_warps": 4,
    }
    _LAUNCHES.first(
        key,
        q.device,
        (min(tiles * num_heads, units), 1, 1),
        tensors,
        (
            total_q,
            batch,
            tiles,
            num_heads,
            heads_at_once,
            softmax_scale * LOG2E,
            q.stride(1),
            k.stride(1),
            0 if rest.shape[1] == 1 else rest.stride(1),
            0 if k_pe is not None or not dim1 else dim0,
            v.stride(1),
            out.stride(0),
            out.stride(1),
            num_heads,
        ),
        constants,
    )


class _Tickets:
    """Pairs of zeros that programs of a launch draw their tiles from; each launch leaves them zero.

    Launches that may run at the same time must not share a pair: each stream has its own, and so has each launch that
    is captured, as graphs captured on one stream may be replayed on several.
    """

    PAIRS = 4096

    def __init__(self, device: torch.device) -> None:
        self._zeros = torch.zeros((self.PAIRS, 4), dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # once: from here on every stream may take them to be zero
        self._used = 0
        self._streams: dict[int, torch.Tensor] = {}

    def of_stream(self, stream: int) -> torch.Tensor:
        if stream not in self._streams:
            self._streams[stream] = self.take()
        return self._streams[stream]

    def take(self) -> torch.Tensor:
        if self._used == self.PAIRS:
            return torch.zeros(4, dtype=torch.int32, device=self._zeros.device)
        self._used += 1
        return self._zeros[self._used - 1]


_TICKETS: dict[torch.device, _Tickets] = {}


def _counters(device: torch.device) -> torch.Tensor:
    if device.type != "cuda":  # compiled, not run
        return torch.zeros(4, dtype=torch.int32)
    capturing = torch.cuda.is_current_stream_capturing()
    found = _TICKETS.get(device)
    if found is None:
        if capturing:  # no way to wait for zeros written outside of the graph: one more node, for this graph alone
            return torch.zeros(4, dtype=torch.int32, device=device)
        found = _TICKETS[device] = _Tickets(device)
    return found.take() if capturing else found.of_stream(torch.cuda.current_stream(device).cuda_stream)
