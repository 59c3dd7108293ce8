"""NaNs with a fingerprint, so that memory nobody wrote can be told from a NaN somebody computed."""

import torch

# Quiet NaNs with a payload that no arithmetic produces. float8_e4m3fn has a single NaN, without a payload.
_PATTERN: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FF8_0000_DEAD_BEEF),
    torch.float32: (torch.int32, 0x7FC0_DEAD),
    torch.bfloat16: (torch.int16, 0x7FDB),
    torch.float16: (torch.int16, 0x7EAD),
    torch.float8_e4m3fn: (torch.uint8, 0x7F),
}


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a floating-point tensor, of any strides, with a marked NaN; returns it."""
    integer, pattern = _pattern(tensor)
    tensor.view(integer).fill_(pattern)
    return tensor


def count_poison(tensor: torch.Tensor) -> int:
    """How many elements still hold the NaN that `poison_` wrote."""
    integer, pattern = _pattern(tensor)
    return int((tensor.view(integer) == pattern).sum())


def _pattern(tensor: torch.Tensor) -> tuple[torch.dtype, int]:
    if tensor.dtype not in _PATTERN:
        raise ValueError(f"cannot poison a tensor of {tensor.dtype}; expected one of {', '.join(map(str, _PATTERN))}")
    return _PATTERN[tensor.dtype]
