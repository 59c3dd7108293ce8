"""`act_quant`, `weight_dequant` and `fp8_gemm`: validate, choose an implementation, run it."""

import torch

from mlakit.dispatch import check_device, check_dtype, check_last_dim_contiguous, check_shape, choose_triton, unobserved
from mlakit.quant import ops
from mlakit.quant.reference import act_quant_reference, fp8_gemm_reference, weight_dequant_reference

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 128


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None, *, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations to float8 in tiles of 1 x `block_size`.

    Args:
        x: [..., N] bfloat16, float16 or float32, N a multiple of `block_size`, stride 1 in the last dimension.
        block_size: elements a scale; a power of two from 16 to 1024 for impl "triton".
        scale_fmt: None: scale = max(amax, 1e-4) / 448; "ue8m0": that, rounded up to a power of two.
        impl: "triton" or "reference"; None takes the first that can run.

    Returns:
        float8_e4m3fn [..., N] and float32 scales [..., N / block_size]; value = code * scale. Both contiguous. NaN
        stays NaN and has no part in its block's scale.

    Raises:
        ValueError: a wrong dtype, size, stride or `scale_fmt`.
        RuntimeError: the named `impl` cannot run here.

    Source: DeepSeek-V3, inference/kernel.py; DeepSeek-V3 report (arXiv:2412.19437), section 3.3.2.
    """
    check_dtype("x", x, *_FLOATS)
    _check_block_size(block_size)
    _check_scale_fmt(scale_fmt)
    if x.ndim == 0 or x.shape[-1] % block_size:
        raise ValueError(f"x must have a last dimension that block_size={block_size} divides, got {list(x.shape)}")
    check_last_dim_contiguous("x", x)
    if choose_triton("act_quant", impl, x, _odd_block(block_size, 16)) == "triton":
        return (ops.run_act_quant if unobserved(x) else ops.act_quant)(x, block_size, scale_fmt)
    return act_quant_reference(x, block_size, scale_fmt)


def weight_dequant(
    w: torch.Tensor,
    scales: torch.Tensor,
    block_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Dequantize a weight that has a scale for each block of `block_size` x `block_size`.

    Args:
        w: [M, N] float8_e4m3fn, stride 1 in the last dimension; M and N need not be multiples of `block_size`.
        scales: [ceil(M / block_size), ceil(N / block_size)] float32, stride 1 in the last dimension.
        block_size: rows and columns of a block; a power of two from 16 to 1024 for impl "triton".
        dtype: bfloat16, float16 or float32.
        impl: "triton" or "reference"; None takes the first that can run.

    Returns:
        [M, N] of `dtype`: code * scale, rounded once.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
        RuntimeError: the named `impl` cannot run here.

    Source: DeepSeek-V3, inference/kernel.py.
    """
    check_shape("w", w, ("M", "N"))
    check_dtype("w", w, torch.float8_e4m3fn)
    _check_block_size(block_size)
    _check_scales("scales", scales, tuple(-(-size // block_size) for size in w.shape), w.device)
    check_last_dim_contiguous("w", w)
    _check_output_dtype(dtype)
    if choose_triton("weight_dequant", impl, w, _odd_block(block_size, 16)) == "triton":
        run = ops.run_weight_dequant if unobserved(w, scales) else ops.weight_dequant
        return run(w, scales, block_size, dtype)
    return weight_dequant_reference(w, scales, block_size, dtype)


def fp8_gemm(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Multiply float8 activations with a float8 weight: a @ b.T, each scaled block by block.

    The products of 128 elements are summed in the tensor core's accumulator and scaled into a float32 sum.

    Args:
        a: [..., K] float8_e4m3fn, contiguous.
        a_scales: [..., ceil(K / 128)] float32, contiguous; of `act_quant`.
        b: [N, K] float8_e4m3fn, contiguous.
        b_scales: [ceil(N / 128), ceil(K / 128)] float32, contiguous; of 128 x 128 blocks.
        dtype: bfloat16, float16 or float32.
        impl: "triton" or "reference"; None takes the first that can run.

    Returns:
        [..., N] of `dtype`.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
        RuntimeError: the named `impl` cannot run here.

    Source: DeepSeek-V3, inference/kernel.py; DeepSeek-V3 report (arXiv:2412.19437), section 3.3.2.
    """
    if a.ndim == 0:
        raise ValueError("a must have shape [..., K], got []")
    check_dtype("a", a, torch.float8_e4m3fn)
    check_shape("b", b, ("N", a.shape[-1]))
    check_dtype("b", b, torch.float8_e4m3fn)
    check_device("b", b, a.device)
    blocks = -(-a.shape[-1] // _BLOCK)
    _check_scales("a_scales", a_scales, (*a.shape[:-1], blocks), a.device)
    _check_scales("b_scales", b_scales, (-(-b.shape[0] // _BLOCK), blocks), a.device)
    for name, tensor in (("a", a), ("a_scales", a_scales), ("b", b), ("b_scales", b_scales)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    _check_output_dtype(dtype)
    if choose_triton("fp8_gemm", impl, a) == "triton":
        run = ops.run_fp8_gemm if unobserved(a, a_scales, b, b_scales) else ops.fp8_gemm
        return run(a, a_scales, b, b_scales, dtype)
    return fp8_gemm_reference(a, a_scales, b, b_scales, dtype)


def _odd_block(block_size: int, least: int) -> str | None:
    if least <= block_size <= 1024 and block_size & (block_size - 1) == 0:
        return None
    return f"block_size must be a power of two from {least} to 1024, got {block_size}"


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")


def _check_scale_fmt(scale_fmt: str | None) -> None:
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt must be None or 'ue8m0', got {scale_fmt!r}")


def _check_scales(name: str, scales: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check_shape(name, scales, shape)
    check_dtype(name, scales, torch.float32)
    check_device(name, scales, device)
    check_last_dim_contiguous(name, scales)


def _check_output_dtype(dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        raise ValueError(f"dtype must be {' or '.join(map(str, _FLOATS))}, got {dtype}")
