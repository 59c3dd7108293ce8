"""What the Hopper kernel of `mla_prefill` can run, and how it is launched. No Triton is imported here."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from mlakit.hardware import capability

BLOCK_M = 128  # query rows of a tile: 64 for each of two warpgroups
_MAX_TICKETS = 2**31 - 2**20  # tiles are numbered with 32 bits, with room for the tickets that find none left


@dataclass(frozen=True)
class HopperConfig:
    """How the kernel is run.

    Attributes:
        block_n: keys of a tile.
        stages: tiles of keys, and of values, in shared memory at once.
        consumer_regs, producer_regs: registers of a thread; 4 warps of the one and 8 of the other fill the file.
    """

    block_n: int = 128
    stages: int = 2
    consumer_regs: int = 240
    producer_regs: int = 24


@lru_cache
def hopper_config(qk_head_dim: int, v_head_dim: int) -> HopperConfig:
    """The launch for these head dims."""
    return HopperConfig()


def key_parts(k: torch.Tensor, k_pe: torch.Tensor | None) -> tuple[int, int]:
    """Columns of the keys' two parts; the second is 0 if there is one."""
    if k_pe is not None:
        return k.shape[2], k_pe.shape[2]
    main = 1 << (k.shape[2].bit_length() - 1)
    return main, k.shape[2] - main


def why_not_hopper(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pe: torch.Tensor | None, batch: int
) -> str | None:
    """Why the Hopper kernel cannot run these inputs where they are, None if it can.

    Addresses are not looked at here, but in `why_not_aligned`: torch.compile has none to show.
    """
    return why_not_device(str(q.device)) or why_not_inputs(q, k, v, k_pe, batch)


def why_not_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pe: torch.Tensor | None, batch: int
) -> str | None:
    """Why the kernel cannot run these inputs on a Hopper, None if it can. What `mla_prefill` checks for all is not
    checked again.
    """
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {q.dtype}"
    main, rest = key_parts(k, k_pe)
    if main not in (64, 128) or rest not in (0, 64, 128) or main + rest > 192 or v.shape[2] not in (64, 128):
        return (
            "head dims may be 64, 128 or 192 (with k_pe 64 + 64, 64 + 128 or 128 + 64) and 64 or 128, got "
            f"{main + rest if k_pe is None else f'{main} + {rest}'} and {v.shape[2]}"
        )
    if k.shape[0] == 0:
        return "it needs at least one key, got none"
    tickets = (q.shape[0] // BLOCK_M + batch + 1) * q.shape[1]
    if tickets > _MAX_TICKETS:
        return f"tiles of {BLOCK_M} rows and a head may be up to {_MAX_TICKETS}, got {tickets}"
    for name, x in (("q", q), ("k", k), ("v", v), ("k_pe", k_pe)):
        if x is None:
            continue
        (rows, heads, dim), (stride_t, stride_h, _) = x.shape, x.stride()
        if (rows > 1 and (stride_t % 8 or stride_t <= 0)) or (heads > 1 and stride_h % 8):
            return f"{name}'s rows and heads must lie multiples of 16 bytes apart, got strides {list(x.stride())}"
        if (heads - 1) * stride_h + dim >= 2**31:
            return f"{name}'s heads may span up to 2^31 elements, got {(heads - 1) * stride_h + dim}"
    return None


def why_not_aligned(*tensors: torch.Tensor | None) -> str | None:
    """Why bulk loads cannot read these tensors, None if they can."""
    for x in tensors:
        if x is not None and x.data_ptr() % 16:
            return f"q, k, v and k_pe must begin at multiples of 16 bytes, got an address of {x.data_ptr() % 16} mod 16"
    return None


def why_not_device(device: str) -> str | None:
    """Why the kernel cannot run on a device, None if it can."""
    if device.startswith("cuda") and (found := capability(device)) == (9, 0):
        return None
    found = capability(device) if device.startswith("cuda") else None
    return f"it needs compute capability 9.0 (Hopper), got {f'{found[0]}.{found[1]}' if found else device}"


# torch.compile need not look into what a device is; as mlakit.dispatch.why_not_triton.
why_not_device._dynamo_marked_constant = True  # type: ignore[attr-defined]
