"""Launch configurations of the Hopper decode kernels, chosen by one function, and what the kernels can take."""

from dataclasses import dataclass

import torch

RANK, ROPE = 512, 64  # what the kernels are written for: DeepSeek's dimensions


# Each warp sums the lengths by itself, 32 of them a thread.
_MOST_REQUESTS = 1024


@dataclass(frozen=True)
class HopperConfig:
    """How a decode kernel is launched."""

    kernel: str  # "many" or "few" heads
    tile_rows: int  # query rows a program
    step: int  # keys a step: work is divided in whole ones
    resident: int  # programs a multiprocessor
    stages: int = 1  # tiles of keys under way (few heads)
    least: int = 1  # steps of a piece, where nobody names a number of pieces
    worker_registers: int = 240  # of the second warpgroup of the e4m3 kernel for many heads; others keep all they have
    max_registers: int = 255


@dataclass(frozen=True)
class HopperPlan:
    """How many slots a batch gets, in pieces of `splits` a request; 0: as the device finds best."""

    batch: int
    row_tiles: int
    slots: int
    splits: int
    partials: int

    @property
    def most_pieces(self) -> int:
        """Pieces a request that there are slots for, or that were asked for."""
        return self.splits or max(self.slots // self.batch, 1)

    @property
    def slot_items(self) -> int:
        """Pieces that a slot takes where each request is cut into so many."""
        return -(-self.batch * self.most_pieces // max(self.slots, 1))

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return self.slots * self.row_tiles


def plan_slots(
    *, batch: int, rows: int, capacity: int, units: int, num_splits: int | None, config: HopperConfig
) -> HopperPlan:
    """Choose the number of slots from what the host knows: programs of one slot run side by side, and all are resident
    at once unless no request is cut.
    """
    row_tiles = -(-rows // config.tile_rows)
    steps = -(-capacity // config.step)
    units *= config.resident
    slots = units // row_tiles
    if num_splits is not None:
        splits = max(1, min(num_splits, steps))
        if splits > 1:
            return HopperPlan(batch, row_tiles, min(slots, batch * splits), splits, batch * splits)
        return HopperPlan(batch, row_tiles, batch, 1, 0)
    if slots * row_tiles < 0.8 * units or steps <= 1:
        return HopperPlan(batch, row_tiles, batch, 1, 0)  # several waves, and nobody waits for another program
    slots = min(slots, batch * steps)
    return HopperPlan(batch, row_tiles, slots, 0, max(2 * slots, slots // batch * batch))


def refusal(
    q: torch.Tensor,
    cache: torch.Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    num_splits: int | None,
    units: int,
) -> str | None:
    """Why the kernels cannot run these inputs, or None. The device is not looked at."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        return f"needs bfloat16, float16 or float8_e4m3fn, got {q.dtype}"
    rows = q.shape[1] * q.shape[2]
    if cache.dtype == torch.uint8:
        if q.dtype != torch.bfloat16:
            return f"needs bfloat16 over a cache with scales of its own, got {q.dtype}"
    elif cache.dtype != q.dtype:
        return f"needs a cache of q's dtype {q.dtype}, got {cache.dtype}"
    if kv_lora_rank != RANK or q.shape[-1] != RANK + ROPE:
        return f"needs kv_lora_rank {RANK} and latent_dim {RANK + ROPE}, got {kv_lora_rank} and {q.shape[-1]}"
    if not softmax_scale > 0:
        return f"needs a positive softmax_scale, got {softmax_scale}"
    pages, page_size, _ = cache.shape
    if page_size < 16 or page_size & (page_size - 1):
        return f"needs a page size that is a power of two and at least 16, got {page_size}"
    if pages == 0:
        return "needs at least one page in the cache"
    page_stride, key_stride, _ = cache.stride()
    if page_stride != page_size * key_stride:
        return f"needs pages that follow one another without gaps, got cache strides {list(cache.stride())}"
    if key_stride * cache.element_size() % 16 or cache.data_ptr() % 16:
        return f"needs keys aligned to 16 bytes, got cache strides {list(cache.stride())} from {cache.data_ptr():#x}"
    if pages * page_size >= 2**31:
        return f"needs fewer than 2**31 slots in the cache, got {pages * page_size}"
    if q.shape[0] > _MOST_REQUESTS:
        return f"needs at most {_MOST_REQUESTS} requests, got {q.shape[0]}"
    if num_splits is not None and q.shape[0] * num_splits * (rows + 64) * RANK >= 2**31:
        return (
            f"needs fewer than 2**31 elements of partial results, got {q.shape[0]} requests of {rows} query rows in "
            f"{num_splits} pieces"
        )
    most = units * (E4M3_FEW16.tile_rows * E4M3_FEW16.resident if cache.dtype == torch.uint8 else MANY.tile_rows)
    if num_splits is not None and num_splits > 1 and rows > most:
        return f"needs at most {most} query rows a request where it is split, got {rows}"
    return None


MANY = HopperConfig("many", tile_rows=64, step=128, resident=1)
FEW32 = HopperConfig("few", tile_rows=32, step=64, resident=1, stages=2)
FEW16 = HopperConfig("few", tile_rows=16, step=64, resident=1, stages=2)


E4M3_FEW32 = HopperConfig("few", tile_rows=32, step=64, resident=2, stages=2)
E4M3_FEW16 = HopperConfig("few", tile_rows=16, step=64, resident=2, stages=2)


def choose_fp8_config(*, rows: int, packed: bool) -> HopperConfig:
    """The launch configuration for `rows` query rows a request from e4m3 caches, or packed ones of 656 bytes a token.

    Measured on an H200, requests x heads x keys, microseconds; one program a multiprocessor of three tiles, three of
    one, two of two: 128x16x8192 180.1, 168.0, 158.5. By tiles of 16, 32 and 64 rows: 128x16x8192 160.0, 193.1, 221.0;
    of 32 and 64: 128x32x8192 194.5, 221.9, 64x48x4096 101.7, 73.7. Packed, one program of four tiles, two of two:
    128x16x8192 252.2, 201.2; 32 rows do not fit into registers.
    """
    if rows <= 16 or packed:
        return E4M3_FEW16
    return E4M3_FEW32 if rows <= 32 else MANY


def choose_config(*, rows: int) -> HopperConfig:
    """The launch configuration for `rows` query rows a request.

    Measured on an H200, requests x heads x keys, microseconds; two programs a multiprocessor of one tile each beside
    one of two: 128x16x8192 288.6, 284.4; 16x16x1024 18.2, 17.8; 128x32x8192 294.8, 288.1.
    """
    if rows <= 16:
        return FEW16
    return FEW32 if rows <= 32 else MANY
