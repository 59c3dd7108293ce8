"""The definitions of `act_quant`, `weight_dequant` and `fp8_gemm`, in plain PyTorch."""

import torch

E4M3_MAX = 448.0
LEAST_AMAX = 1e-4


def block_scale(amax: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    """The float32 scale of blocks whose largest magnitudes are `amax`: max(amax, 1e-4) / 448, for "ue8m0" rounded up to
    a power of two.

    Source: DeepSeek-V3, inference/kernel.py; the floor of 1e-4 keeps a block of zeros from being divided by zero.
    """
    # By a tensor: a Python number's reciprocal is what PyTorch multiplies by on a GPU, and the last bit may differ.
    scale = amax.float().clamp(min=LEAST_AMAX) / amax.new_full((), E4M3_MAX, dtype=torch.float32)
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return scale


def act_quant_reference(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each run of `block_size` elements of x's last dimension with a scale of its own.

    Args:
        x: [..., N], N a multiple of `block_size`.
        block_size: elements a scale.
        scale_fmt: None for float32 scales, "ue8m0" for powers of two.

    Returns:
        float8_e4m3fn [..., N] and float32 scales [..., N / block_size]; value = code * scale. NaN stays NaN and has no
        part in its block's scale.
    """
    blocks = x.float().unflatten(-1, (-1, block_size))
    scales = block_scale(blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1), scale_fmt)
    quotients = (blocks / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    return quotients.to(torch.float8_e4m3fn).flatten(-2), scales


def weight_quant(
    w: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize w [M, N] in square blocks, the last row and column of blocks as large as they are; the inverse of
    `weight_dequant`.

    Returns:
        float8_e4m3fn [M, N] and float32 scales [ceil(M / block_size), ceil(N / block_size)].
    """
    rows, columns = (-(-size // block_size) for size in w.shape)
    padded = w.new_zeros(rows * block_size, columns * block_size, dtype=torch.float32)
    padded[: w.shape[0], : w.shape[1]] = w
    amax = padded.view(rows, block_size, columns, block_size).abs().amax(dim=(1, 3))
    scales = block_scale(amax, scale_fmt)
    codes = (w.float() / spread(scales, w.shape, block_size)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scales


def spread(scales: torch.Tensor, shape: torch.Size, block_size: int) -> torch.Tensor:
    """Repeat the scale of each square block for all its elements."""
    full = scales.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return full[: shape[0], : shape[1]]


def weight_dequant_reference(
    w: torch.Tensor, scales: torch.Tensor, block_size: int = 128, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Multiply each square block of w with its scale.

    Args:
        w: [M, N] float8_e4m3fn.
        scales: [ceil(M / block_size), ceil(N / block_size)] float32.
        block_size: rows and columns of a block.
        dtype: of the result; the product is rounded once. With float64 nothing is rounded.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (w.to(compute) * spread(scales, w.shape, block_size).to(compute)).to(dtype)


def fp8_gemm_reference(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Multiply blockwise scaled float8 matrices: a @ b.T.

    Args:
        a: [..., K] float8_e4m3fn.
        a_scales: [..., ceil(K / 128)] float32: one for each run of 128 elements.
        b: [N, K] float8_e4m3fn.
        b_scales: [ceil(N / 128), ceil(K / 128)] float32: one for each 128 x 128 block.
        dtype: of the result [..., N]. The products are summed in float32, or in float64 if that is asked for.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    wide = a.to(compute) * a_scales.to(compute).repeat_interleave(128, dim=-1)[..., : a.shape[-1]]
    return (wide @ weight_dequant_reference(b, b_scales, dtype=compute).T).to(dtype)
