"""What the Hopper kernels can run, and how they are launched. No Triton is imported here."""

from dataclasses import dataclass

import torch

RANK = 512  # width of the value that the kernels are written for: DeepSeek's
ROPE = 64
ROWS = 64  # heads a program
PAIR = 128  # keys a step: two tiles


@dataclass(frozen=True)
class HopperConfig:
    """How the kernel is run.

    Attributes:
        consumer_regs, producer_regs: registers of a thread; two warpgroups of the one and one of the other fill the
            file.
        parts: in how many parts half a tile is told to be there; in one from the float8 cache.
    """

    consumer_regs: int = 216
    producer_regs: int = 72
    parts: int = 2


def choose_config(fp8: bool) -> HopperConfig:
    """The launch for keys of 16 bits, or of the float8 cache, whose gathering needs registers for what is on its way.

    Measured on an H200: prefill of 4096 tokens, topk 2048, takes 3.75 ms in two parts, 3.82 in one. Decode of 128
    requests of two tokens from a float8 cache that L2 holds: 347 us; an earlier form took 352, with 208 and 88
    registers 427.
    """
    return HopperConfig(200, 104, 1) if fp8 else HopperConfig()


def refusal(q: torch.Tensor, keys: torch.Tensor, d_v: int, out: torch.Tensor | None = None) -> str | None:
    """Why the kernels cannot run these inputs on a Hopper, None if they can. What is checked for all implementations is
    not checked again. `keys`: [s_kv, key heads, d], or a cache [pages, page_size, d or bytes].
    """
    latent = q.shape[-1]
    if keys.dtype == torch.uint8:
        if q.dtype != torch.bfloat16:
            return f"needs bfloat16 queries for the float8 cache, got {q.dtype}"
        widths: tuple[int, ...] = (RANK + ROPE,)
    else:
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"needs bfloat16 or float16, got {q.dtype}"
        widths = (RANK, RANK + ROPE)
    if d_v != RANK or latent not in widths:
        return f"needs values of {RANK} and keys of {' or '.join(map(str, widths))}, got {d_v} and {latent}"
    if keys.numel() == 0 or q.numel() == 0:
        return "needs at least one key and one query, got none"
    unit = 16 // keys.element_size()
    if keys.data_ptr() % 16 or any(stride % unit for stride in keys.stride()[:2]):
        return (
            f"needs keys aligned to 16 bytes, got strides {list(keys.stride())} from an address of "
            f"{keys.data_ptr() % 16} mod 16"
        )
    if q.data_ptr() % 16 or any(stride % 8 for stride in q.stride()[:-1]):
        return f"needs queries aligned to 16 bytes, got strides {list(q.stride())} from {q.data_ptr() % 16} mod 16"
    if q.numel() // latent * (1 if q.ndim == 3 else 64) >= 2**31:
        return f"needs fewer than 2**31 query rows, times 64 pieces in decoding, got {q.numel() // latent}"
    if out is not None and out.stride(-2) >= 2**24:
        return f"needs heads of out less than 2**24 elements apart, got {out.stride(-2)}"
    return None


def is_taken(q: torch.Tensor, keys: torch.Tensor) -> bool:
    """Is this kernel the default for inputs that it can run?

    Where it was measured to be faster than the portable one. H200, keys of 16 bits: prefill 1.9 to 2.1 times with 128
    heads, 1.2 times with 16; decode of 8 requests of 128 heads 1.8 times, of 128 of 16 heads 1.2 times. From the float8
    cache 16 requests of 16 heads take 31 us instead of 32, 8 of 128 heads 30 instead of 44, 128 of 16 heads 121 instead
    of 142; but 8 of 16 heads 23 instead of 22 and one of 128 heads 21 instead of 19.5.
    """
    return q.ndim == 3 or q.shape[0] * q.shape[1] * -(-q.shape[2] // ROWS) >= 16
