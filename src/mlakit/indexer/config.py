"""Launch configurations of the indexer's kernels, each chosen by one function of shapes and device."""

import math
from dataclasses import dataclass

from mlakit.hardware import DeviceInfo


@dataclass(frozen=True)
class LogitsConfig:
    """Tile of the logits kernel: `block_q` queries (all their heads) by `block_n` keys a step.

    A program scores `split` keys (a multiple of `block_n`), so that few queries fill the device too. `descriptors`
    loads keys by TMA (compute capability 9.0 and up). `max_registers` makes room for another program on a
    multiprocessor.
    """

    block_q: int
    block_n: int
    num_warps: int
    num_stages: int
    split: int = 1 << 20
    descriptors: bool = False
    max_registers: int | None = None


def logits_config(s_q: int, s_kv: int, heads: int, info: DeviceInfo, *, q_len: int | None = None) -> LogitsConfig:
    """The tile for s_q queries of so many heads and s_kv keys on a device; `q_len` queries a request of paged keys.

    On an H200 with 64 heads, four programs of two queries and 64 keys share a multiprocessor: while one sums, the
    others multiply. A tile of 128 keys leaves room for two of them and is 5% slower.
    """
    found = info.capability
    native = found is not None and found >= (8, 9)
    block_q = 2 if heads <= 64 and (q_len is None or q_len > 1) else 1
    block_n = 32 if not native else 64 if block_q == 2 or heads > 64 else 128
    programs = -(-s_q // block_q) if q_len is None else s_q // max(q_len, 1) * -(-q_len // block_q)
    # Several rounds of the four programs that fit a multiprocessor, so that the last round costs little, but not so few
    # keys that loading the queries counts.
    rounds, least = (16, 1024) if q_len is None else (2, 512)
    parts = max(1, min(4 * rounds * info.units // max(programs, 1), -(-s_kv // least)))
    split = -(-s_kv // (parts * block_n)) * block_n
    descriptors = q_len is None and found is not None and found[0] in (9, 10) and s_q * s_kv >= _WORTH_DESCRIPTORS
    stages = 4 if descriptors else 3 if native else 2
    return LogitsConfig(block_q, block_n, 4, stages, split, descriptors)


# Descriptors cost the host some 50 us a call. From here on the kernel takes longer than that.
_WORTH_DESCRIPTORS = 2**23


@dataclass(frozen=True)
class TopkConfig:
    """How `select_topk` works on a row: `programs` of `num_warps` warps a multiprocessor at most.

    Up to `tile` values are held in registers. Of longer rows `sample` values are, then come up to `capacity`
    candidates, of which `tile` are held. `prefetch` loads a block while the one before is searched.
    """

    tile: int
    sample: int
    num_warps: int
    programs: int
    capacity: int
    max_registers: int | None = None
    prefetch: bool = True


def topk_config(columns: int, k: int, rows: int, units: int) -> TopkConfig:
    """The launch for rows of so many columns on a device of `units` multiprocessors."""
    sample = 2048 if columns <= 32768 else 4096 if columns <= 65536 else 8192
    share = min(k / columns, 1.0)
    expected = sample * share
    deviation = math.sqrt(expected * (1 - share))
    a_sample = columns / sample
    undecided = (6 * deviation + 6) * a_sample + k / 8  # between the thresholds, on average
    candidates = (expected + 3 * deviation + 3) * 17 / 16 * a_sample
    tile = max(2048, _power_of_2(1.25 * undecided))
    capacity = max(4096, _power_of_2(1.25 * candidates))
    # A warp a row if that fills the device: what is counted has to be summed over warps, and each does that again.
    warps = 16 if rows <= 2 * units else 1 if sample == 2048 and tile == 2048 else 4 if sample == 8192 else 2
    if tile > 2048 * warps:
        warps = min(tile // 2048, 16)
    # With 128 registers, sixteen warps share a multiprocessor. More than 32 values a thread need more.
    registers = 128 if warps == 1 or max(tile, sample) <= 1024 * warps else None
    return TopkConfig(tile, sample, warps, max(16 // warps, 1), capacity, registers)


def _power_of_2(least: float) -> int:
    return 1 << max(math.ceil(least) - 1, 0).bit_length()
