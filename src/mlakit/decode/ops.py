"""The torch.library schema of `mla_decode`: what torch.compile and CUDA graphs see. No gradient: decoding is inference.

The implementation is chosen inside the operator, where torch.compile does not look: what the device can do is no
business of a graph's.
"""

import importlib.util
import os
import re
from functools import lru_cache

import torch

from mlakit.decode import hopper_config
from mlakit.decode.all_slots import decode_all_slots, is_faster
from mlakit.decode.reference import mla_decode_reference
from mlakit.dispatch import choose, misplaced_row
from mlakit.hardware import capability, device_info

_INPUTS = "Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens"
_OPTIONS = (
    "float softmax_scale, bool causal, int kv_lora_rank, int? num_splits, str? impl, float q_scale=1.0, "
    "float kv_scale=1.0"
)

# Registered by key and not by torch.library.custom_op: the wrappers of the latter cost more host time than a small
# decode takes.
torch.library.define(
    "mlakit::mla_decode", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.define(
    "mlakit::mla_decode_out",
    f"({_INPUTS}, Tensor(a!) out, Tensor(b!) lse, {_OPTIONS}) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    kv_lora_rank: int,
    num_splits: int | None,
    impl: str | None,
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty((*q.shape[:3], kv_lora_rank), dtype=out_dtype(q))
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q))
    options = (softmax_scale, causal, kv_lora_rank, num_splits, impl, q_scale, kv_scale)
    decode_out(q, cache, block_table, seq_lens, out, lse, *options)
    return out, lse


def decode_out(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    kv_lora_rank: int,
    num_splits: int | None,
    impl: str | None,
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
) -> None:
    if q.device.type == "cpu":
        check_capacity(cache, block_table, seq_lens)
    chosen = choose("mla_decode", impl, candidates(q, cache, softmax_scale, kv_lora_rank, num_splits))
    if chosen == "reference":
        result, logs = mla_decode_reference(
            q,
            cache,
            block_table,
            seq_lens,
            softmax_scale=softmax_scale,
            causal=causal,
            kv_lora_rank=kv_lora_rank,
            q_scale=q_scale,
            kv_scale=kv_scale,
        )
        out.copy_(result)
        lse.copy_(logs)
        return
    if cache.dtype == torch.uint8 and is_faster(chosen, q, cache, block_table, out, num_splits):
        decode_all_slots(
            q, cache, block_table, seq_lens, out, lse, softmax_scale=softmax_scale, causal=causal, impl=chosen
        )  # fmt: skip
        return
    if chosen == "hopper":
        from mlakit.decode.hopper_launch import _launch_hopper_decode

        _launch_hopper_decode(
            q,
            cache,
            block_table,
            seq_lens,
            out,
            lse,
            softmax_scale=softmax_scale,
            causal=causal,
            num_splits=num_splits,
            q_scale=q_scale,
            kv_scale=kv_scale,
        )
        return
    from mlakit.decode.triton_launch import _launch_decode

    _launch_decode(
        q,
        cache,
        block_table,
        seq_lens,
        out,
        lse,
        softmax_scale=softmax_scale,
        causal=causal,
        kv_lora_rank=kv_lora_rank,
        num_splits=num_splits,
        q_scale=q_scale,
        kv_scale=kv_scale,
    )


def candidates(
    q: torch.Tensor,
    cache: torch.Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    num_splits: int | None,
) -> dict[str, str | None]:
    """Implementations, fastest first, each with why it cannot run these inputs (None if it can)."""
    device = str(q.device)
    triton = _environment_reason(device, os.environ.get("TRITON_INTERPRET", "0") == "1")
    triton = triton or _input_reason(q, cache, kv_lora_rank)
    hopper = _hopper_reason(device) or hopper_config.refusal(
        q, cache, softmax_scale, kv_lora_rank, num_splits, device_info(device).units
    )
    if q.device.type == "cpu":  # there Triton can only be interpreted, which is for tests
        return {"reference": None, "triton": triton, "hopper": hopper}
    return {"hopper": hopper, "triton": triton, "reference": None}


@lru_cache
def _hopper_reason(device: str) -> str | None:
    """Why the Gluon kernels cannot run on a device at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu":
        return "the tensors are on the CPU, and Gluon has no interpreter"
    if (found := capability(device)) != (9, 0):
        return f"needs an NVIDIA GPU of compute capability 9.0, found {found}"
    import triton  # on a GPU that these kernels are for; importing mlakit must not

    if tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2]) < (3, 6):
        return f"needs Triton 3.6 or later for Gluon, found {triton.__version__}"
    return None


@lru_cache
def _environment_reason(device: str, interpret: bool) -> str | None:
    """Why Triton cannot run on a device at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu":
        return None if interpret else "the tensors are on the CPU (TRITON_INTERPRET=1 would interpret the kernel)"
    if (found := capability(device)) is None or found < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, found {found}"
    return None


def _input_reason(q: torch.Tensor, cache: torch.Tensor, kv_lora_rank: int) -> str | None:
    """Why the Triton kernels cannot run these inputs, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        return f"needs bfloat16, float16 or float8_e4m3fn, got {q.dtype}"
    if reason := misplaced_row(cache):
        return reason
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return "Triton's interpreter multiplies the bits of bfloat16 as integers; use float16 there"
    page_size, rope_dim = cache.shape[1], q.shape[-1] - kv_lora_rank
    if page_size & (page_size - 1):
        return f"needs a page size that is a power of two, got {page_size}"
    for name, size, least in (("kv_lora_rank", kv_lora_rank, 32), ("the rope part", rope_dim, 16)):
        if size < least or size & (size - 1):
            return f"needs {name} to be a power of two and at least {least}, got {size}"
    return None


def check_capacity(cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Require that the table has a slot for every key. Reads the lengths, so on a GPU it would wait for it: call it on
    the CPU.

    Raises:
        ValueError: naming the longest request and the capacity, or a negative length.
    """
    if seq_lens.numel() == 0:
        return
    capacity = block_table.shape[1] * cache.shape[1]
    shortest, longest = int(seq_lens.min()), int(seq_lens.max())
    if shortest < 0:
        raise ValueError(f"seq_lens must not be negative, got {shortest}")
    if longest > capacity:
        raise ValueError(
            f"block_table is too short: its {block_table.shape[1]} pages of {cache.shape[1]} tokens hold {capacity} "
            f"keys, seq_lens has {longest}"
        )


@torch.library.register_fake("mlakit::mla_decode")
def _decode_fake(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    kv_lora_rank: int,
    num_splits: int | None,
    impl: str | None,
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:3], kv_lora_rank), dtype=out_dtype(q)), q.new_empty(q.shape[:3], dtype=lse_dtype(q))


@torch.library.register_fake("mlakit::mla_decode_out")
def _decode_out_fake(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    kv_lora_rank: int,
    num_splits: int | None,
    impl: str | None,
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
) -> None:
    return None


def out_dtype(q: torch.Tensor) -> torch.dtype:
    """Of a result that nobody gave a tensor for."""
    return torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype


def lse_dtype(q: torch.Tensor) -> torch.dtype:
    """Of the log-sum-exps."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


torch.library.impl("mlakit::mla_decode", ("cpu", "cuda"), decode)
torch.library.impl("mlakit::mla_decode_out", ("cpu", "cuda"), decode_out)
