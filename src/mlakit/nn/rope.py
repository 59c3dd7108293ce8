"""The table of rotary frequencies, YaRN's included."""

import math

import torch

from mlakit.nn.args import Args


def precompute_freqs_cis(args: Args, device: torch.device | str | None = None) -> torch.Tensor:
    """The rotation of every position: exp(i * position * frequency).

    Returns:
        [max_seq_len, qk_rope_head_dim / 2] complex64 on `device`. Angles are computed in float64: in float32 those of
        position 100,000 are off by 0.004.

    Source: RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071), section 3.2; DeepSeek-V3, inference/model.py.
    """
    half = args.qk_rope_head_dim // 2
    steps = torch.arange(half, dtype=torch.float64)
    freqs = args.rope_theta ** (-steps / half)
    if args.uses_yarn:
        low, high = _ramp(args)
        kept = 1 - ((steps - low) / (high - low)).clamp(0, 1)
        freqs = freqs / args.rope_factor * (1 - kept) + freqs * kept
    angles = torch.outer(torch.arange(args.max_seq_len, dtype=torch.float64), freqs)
    table = torch.polar(torch.full_like(angles, args.rope_amplitude), angles)
    return table.to(torch.complex64).to(device)


def _ramp(args: Args) -> tuple[float, float]:
    """Between which frequencies YaRN goes from leaving as is to dividing by the factor."""

    def index_of(rotations: float) -> float:
        # The (fractional) index of the frequency that turns this often within the original context.
        wavelength = args.original_seq_len / (rotations * 2 * math.pi)
        return args.qk_rope_head_dim * math.log(wavelength) / (2 * math.log(args.rope_theta))

    low = max(math.floor(index_of(args.beta_fast)), 0)
    high = min(math.ceil(index_of(args.beta_slow)), args.qk_rope_head_dim - 1)
    return low, high if high > low else low + 0.001
