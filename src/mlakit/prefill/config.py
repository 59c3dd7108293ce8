"""Launch configurations of the portable prefill kernels: how head dims are cut, and which tiles a device gets."""

from dataclasses import dataclass
from functools import lru_cache

from mlakit.hardware import shared_limit

MIN_DOT_DIM = 16  # tl.dot's least depth
MAX_QK_DIM, MAX_V_DIM = 576, 512  # forward, of which 576/512 (MQA mode expanded) is there for comparisons
MAX_BACKWARD_DIM = 256


@dataclass(frozen=True)
class HeadSplit:
    """A head dim as one or two powers of two, since Triton's tiles are such: 192 = 128 + 64 computes no padding."""

    main: int
    rest: int  # 0 if there is no second part
    padded: bool  # the parts are wider than the head dim, and loads need a mask

    @property
    def width(self) -> int:
        """Columns computed."""
        return self.main + self.rest


@dataclass(frozen=True)
class PrefillConfig:
    """Tile of one thread block and how it is run. `tma`: bulk loads of keys and values through tensor descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


@lru_cache
def split_head_dim(dim: int) -> HeadSplit:
    """Cut a head dim into at most two powers of two, padding as little as that allows."""
    whole = max(MIN_DOT_DIM, _next_power_of_2(dim))
    if whole == dim or dim < MIN_DOT_DIM:
        return HeadSplit(whole, 0, whole != dim)
    main = whole // 2
    rest = max(MIN_DOT_DIM, _next_power_of_2(dim - main))
    if main + rest >= whole:
        return HeadSplit(whole, 0, True)
    return HeadSplit(main, rest, main + rest != dim)


def value_width(v_head_dim: int) -> int:
    """Columns of the value tile: a power of two."""
    return max(MIN_DOT_DIM, _next_power_of_2(v_head_dim))


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def forward_config(qk_head_dim: int, v_head_dim: int, capability: tuple[int, int], rows: int) -> PrefillConfig:
    """The forward kernel's configuration. `rows` is a bound of a sequence's length, or a guess; it only tells short
    from long.
    """
    return _forward_config(qk_head_dim, v_head_dim, capability, rows <= 64)


@lru_cache  # this is done anew in each call, and the host has little time for a short one
def _forward_config(qk_head_dim: int, v_head_dim: int, capability: tuple[int, int], short: bool) -> PrefillConfig:
    width_v = value_width(v_head_dim)
    width = max(split_head_dim(qk_head_dim).width, width_v)
    # Of these the first that fits shared memory. None spills (tests/prefill/test_prefill_compile.py).
    if capability[0] == 9:
        if width_v > 256:
            candidates = [PrefillConfig(64, 16, 8, 3)]  # by bulk loads four registers spill with Triton 3.6
        elif short:
            candidates = [PrefillConfig(64, 64 if width <= 192 else 32, 4, 2, tma=True)]
        else:
            # 64 keys and three stages: two loads are in flight while a block is computed. 128 keys fit only two stages.
            candidates = [PrefillConfig(128, 64, 8, 3, tma=True), PrefillConfig(128, 64, 8, 2, tma=True)]
    elif capability[0] == 10:
        if width_v > 256:
            candidates = [PrefillConfig(32, 16, 8, 2)]
        elif short or width > 192:
            candidates = [PrefillConfig(64, 64, 8, 2, tma=True)]
        else:
            candidates = [PrefillConfig(128, 64, 8, 3, tma=True)]
    elif width_v > 256:
        candidates = [PrefillConfig(64, 16, 8, 2), PrefillConfig(16, 16, 4, 2)]
    elif width > 192:
        candidates = [PrefillConfig(64, 64, 8, 2), PrefillConfig(64, 32, 8, 2), PrefillConfig(32, 32, 4, 2)]
    elif short:
        candidates = [PrefillConfig(64, 32, 4, 2)]
    else:
        candidates = [PrefillConfig(128, 32, 8, 2), PrefillConfig(64, 32, 4, 2)]
    limit = shared_limit(capability)
    for config in candidates:
        if forward_shared_bytes(config, qk_head_dim, v_head_dim) <= limit:
            return config
    return PrefillConfig(16, 16, 4, 1)


def forward_shared_bytes(config: PrefillConfig, qk_head_dim: int, v_head_dim: int) -> int:
    """Shared memory of a configuration: the queries, and a ring of keys and values."""
    qk = split_head_dim(qk_head_dim).width
    return 2 * (config.block_m * qk + config.num_stages * config.block_n * (qk + value_width(v_head_dim)))


@lru_cache
def backward_configs(
    qk_head_dim: int, v_head_dim: int, capability: tuple[int, int]
) -> tuple[PrefillConfig, PrefillConfig]:
    """Configurations of the kernel for dK and dV, and of the kernel for dQ."""
    width = max(split_head_dim(qk_head_dim).width, value_width(v_head_dim))
    if capability[0] in (9, 10):
        if width > 192:
            return PrefillConfig(32, 64, 8, 2), PrefillConfig(64, 32, 8, 2)
        if capability[0] == 10 and width > 128:  # 32 x 128 spills two registers with Triton 3.6
            return PrefillConfig(64, 64, 8, 2), PrefillConfig(128, 64, 8, 2)
        if capability[0] == 9:
            # One H200, 1x4096x128 causal: a third stage takes the two kernels from 5.66 to 5.47 and to 5.18 ms.
            return PrefillConfig(32, 128, 8, 3), PrefillConfig(128, 64, 8, 3)
        return PrefillConfig(32, 128, 8, 2), PrefillConfig(128, 64, 8, 2)
    if width > 192:
        return PrefillConfig(16, 64, 8, 2), PrefillConfig(64, 32, 8, 2)
    if width <= 128:
        return PrefillConfig(32, 64, 8, 2), PrefillConfig(32, 32, 4, 2)
    return PrefillConfig(32, 32, 4, 2), PrefillConfig(32, 32, 4, 2)  # 64 keys spill 2600 registers
