"""Launch configurations of the indexer's kernels, each chosen by one function of shapes and device."""

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


def logits_config(s_q: int, s_kv: int, heads: int, info: DeviceInfo, *, paged: bool) -> LogitsConfig:
    """The tile for s_q queries of so many heads and s_kv keys on a device."""
    found = info.capability
    native = found is not None and found >= (8, 9)
    block_q = 2 if not paged and heads <= 64 else 1
    block_n = 64 if native else 32
    programs = -(-s_q // block_q)
    # Eight rounds of the four programs that fit a multiprocessor, so that the last round costs little; at least 1024
    # keys each, as a program begins by loading its queries.
    parts = max(1, min(-(-32 * info.units // max(programs, 1)), -(-s_kv // 1024)))
    split = -(-s_kv // (parts * 1024)) * 1024
    return LogitsConfig(block_q, block_n, num_warps=4, num_stages=3 if native else 2, split=split)


@dataclass(frozen=True)
class TopkConfig:
    """How `select_topk` works on a row: up to `capacity` keys in registers, of longer rows first `sample` of them and
    then candidates, `programs` of `num_warps` warps a multiprocessor at most.
    """

    capacity: int
    sample: int
    block: int
    num_warps: int
    programs: int
    max_registers: int | None = None
    prefetch: bool = False


def topk_config(columns: int, k: int, rows: int, units: int) -> TopkConfig:
    """The launch for rows of so many columns on a device of `units` multiprocessors."""
    # Twice as many candidates as are wanted have room. Of longer rows a larger sample is needed, or a few of its keys
    # would decide.
    capacity = max(4096 if columns <= 262144 else 8192, 1 << (2 * k - 1).bit_length())
    sample = 4096 if columns <= 65536 else 8192
    few = rows <= units  # a row to a multiprocessor: let more threads at it
    warps = 16 if few or capacity > 8192 else 8
    return TopkConfig(capacity, sample, 2048, num_warps=warps, programs=4 if warps == 8 else 2)
