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

    Up to `capacity` keys are held in registers. Of longer rows `sample` keys are, then up to `capacity` candidates;
    what must be searched in memory is read in steps of `block`. `prefetch` loads the next part of a row while one is
    looked through.
    """

    capacity: int
    sample: int
    block: int
    num_warps: int
    programs: int
    max_registers: int | None = 128
    prefetch: bool = True


def topk_config(columns: int, k: int, rows: int, info: DeviceInfo) -> TopkConfig:
    """The launch for rows of so many columns on a device.

    On an H200, k = 2048: 4096 x 8192 took 0.225 ms with 4 warps a row and 0.251 with 8, 4096 x 32768 0.347 and 0.364. A
    kernel made for one or two warps a row, which repeat least of what every warp does, took 0.269 and 0.367.
    """
    # Twice as many candidates as are wanted have room. Of longer rows a larger sample is needed, or a few of its keys
    # would decide.
    capacity = max(4096 if columns <= 262144 else 8192, 1 << (2 * k - 1).bit_length())
    sample = 2048 if columns <= 32768 else 4096 if columns <= 65536 else 8192
    # At most 32 keys a thread; few rows get more threads, which are idle otherwise.
    warps = 16 if rows <= info.units else 4 if max(capacity, 2 * sample) <= 4096 else 8
    # With 128 registers, sixteen warps share a multiprocessor. Larger capacities and Blackwell's kernels need more.
    tight = warps == 16 or (capacity <= 4096 and info.capability is not None and info.capability[0] <= 9)
    return TopkConfig(capacity, sample, 1024, warps, 16 // warps, 128 if tight else None)
