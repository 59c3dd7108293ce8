"""The torch.library schemas of the sparse operations: what torch.compile and CUDA graphs see. No gradient.

The implementation is chosen inside the operators, where torch.compile does not look: what the device can do is no
business of a graph's.
"""

import importlib.util
from functools import lru_cache

import torch

from mlakit.dispatch import choose, misplaced_row, why_not_triton
from mlakit.hardware import capability
from mlakit.sparse import hopper_config
from mlakit.sparse.reference import mla_sparse_decode_reference, mla_sparse_prefill_reference

_PREFILL = "Tensor q, Tensor kv, Tensor indices"
_PREFILL_OPTIONS = "float softmax_scale, int d_v, Tensor? attn_sink, Tensor? topk_length, str? impl"
_DECODE = "Tensor q, Tensor cache, Tensor indices"
_DECODE_OPTIONS = (
    "float softmax_scale, int kv_lora_rank, Tensor? attn_sink, Tensor? topk_length, int? num_splits, str? impl"
)


def prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = q.new_empty((*q.shape[:2], d_v))
    return out, *prefill_out(q, kv, indices, out, softmax_scale, d_v, attn_sink, topk_length, impl)


def prefill_out(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = choose_impl("mla_sparse_prefill", impl, q, kv, d_v, out)
    if chosen == "reference":
        result, max_logits, lse = mla_sparse_prefill_reference(
            q, kv, indices, softmax_scale=softmax_scale, d_v=d_v, attn_sink=attn_sink, topk_length=topk_length
        )
        out.copy_(result)
        return max_logits, lse
    max_logits = q.new_empty(q.shape[:2], dtype=torch.float32)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if chosen == "hopper":
        from mlakit.sparse.hopper_launch import _launch_hopper

        _launch_hopper(
            q, kv, indices, attn_sink, topk_length, out, max_logits, lse, softmax_scale=softmax_scale, num_splits=1
        )
        return max_logits, lse
    from mlakit.sparse.triton_launch import _launch_prefill

    _launch_prefill(q, kv, indices, attn_sink, topk_length, out, max_logits, lse, softmax_scale=softmax_scale)
    return max_logits, lse


def decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    num_splits: int | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty((*q.shape[:3], kv_lora_rank))
    options = (softmax_scale, kv_lora_rank, attn_sink, topk_length, num_splits, impl)
    return out, decode_out(q, cache, indices, out, *options)


def decode_out(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    num_splits: int | None,
    impl: str | None,
) -> torch.Tensor:
    chosen = choose_impl("mla_sparse_decode", impl, q, cache, kv_lora_rank, out)
    if chosen == "reference":
        result, lse = mla_sparse_decode_reference(
            q,
            cache,
            indices,
            softmax_scale=softmax_scale,
            kv_lora_rank=kv_lora_rank,
            attn_sink=attn_sink,
            topk_length=topk_length,
        )
        out.copy_(result)
        return lse
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if chosen == "hopper":
        from mlakit.sparse.hopper_launch import _launch_hopper

        _launch_hopper(
            q, cache, indices, attn_sink, topk_length, out, None, lse, softmax_scale=softmax_scale,
            num_splits=num_splits,
        )  # fmt: skip
        return lse
    from mlakit.sparse.triton_launch import _launch_decode

    _launch_decode(
        q, cache, indices, attn_sink, topk_length, out, lse, softmax_scale=softmax_scale, num_splits=num_splits
    )
    return lse


def choose_impl(
    operation: str, impl: str | None, q: torch.Tensor, keys: torch.Tensor, d_v: int, out: torch.Tensor | None
) -> str:
    """The implementation to run, the fastest where none is named."""
    hopper = _hopper_reason(str(q.device)) or hopper_config.refusal(q, keys, d_v, out)
    if hopper is None and (impl == "hopper" or (impl is None and hopper_config.is_taken(q, keys))):
        return "hopper"
    triton = why_not_triton(str(q.device)) or _input_reason(q, keys, d_v)
    if not q.is_cuda:  # there Triton can only be interpreted, which is for tests
        return choose(operation, impl, {"reference": None, "triton": triton, "hopper": hopper})
    return choose(operation, impl, {"triton": triton, "hopper": hopper, "reference": None})


@lru_cache
def _hopper_reason(device: str) -> str | None:
    """Why the Gluon kernels cannot run on a device at all, or None."""
    if not device.startswith("cuda"):
        return f"it needs an NVIDIA GPU, got tensors on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if (found := capability(device)) != (9, 0):
        return f"needs compute capability 9.0 (Hopper), found {found}"
    import triton  # on a GPU that these kernels are for; importing mlakit must not

    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 6):
        return f"needs Triton 3.6 or later for Gluon, found {triton.__version__}"
    return None


def _input_reason(q: torch.Tensor, keys: torch.Tensor, d_v: int) -> str | None:
    """Why the Triton kernels cannot run these inputs, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {q.dtype}"
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return "Triton's interpreter multiplies the bits of bfloat16 as integers; use float16 there"
    rope = q.shape[-1] - d_v
    if d_v < 32 or d_v & (d_v - 1):
        return f"needs the value's width to be a power of two and at least 32, got {d_v}"
    if rope and (rope < 16 or rope & (rope - 1)):
        return f"needs the rope part to be absent, or a power of two and at least 16, got {rope}"
    return misplaced_row(keys)


def _lse_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _prefill_fake(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers = q.new_empty(q.shape[:2], dtype=_lse_dtype(q))
    return q.new_empty((*q.shape[:2], d_v)), numbers, torch.empty_like(numbers)


def _prefill_out_fake(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = q.new_empty(q.shape[:2], dtype=_lse_dtype(q))
    return numbers, torch.empty_like(numbers)


def _decode_fake(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    num_splits: int | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:3], kv_lora_rank)), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


def _decode_out_fake(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    num_splits: int | None,
    impl: str | None,
) -> torch.Tensor:
    return q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


# Registered by key and not by torch.library.custom_op: the wrappers of the latter cost more host time than a small
# decode takes.
for _name, _schema, _run, _fake in (
    ("mla_sparse_prefill", f"({_PREFILL}, {_PREFILL_OPTIONS}) -> (Tensor, Tensor, Tensor)", prefill, _prefill_fake),
    (
        "mla_sparse_prefill_out",
        f"({_PREFILL}, Tensor(a!) out, {_PREFILL_OPTIONS}) -> (Tensor, Tensor)",
        prefill_out,
        _prefill_out_fake,
    ),
    ("mla_sparse_decode", f"({_DECODE}, {_DECODE_OPTIONS}) -> (Tensor, Tensor)", decode, _decode_fake),
    (
        "mla_sparse_decode_out",
        f"({_DECODE}, Tensor(a!) out, {_DECODE_OPTIONS}) -> Tensor",
        decode_out,
        _decode_out_fake,
    ),
):
    torch.library.define(f"mlakit::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"mlakit::{_name}", _fake)
    torch.library.impl(f"mlakit::{_name}", ("cpu", "cuda"), _run)
