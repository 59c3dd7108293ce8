"""DeepSeek-V3's own layer, written out from its definition: what the tests of `mlakit.nn` compare with, and the
baseline of benchmarks/h200/layer.py.

It computes what DeepSeek-V3's inference/model.py computes, step by step and in its dtypes: plain PyTorch, whole tensors
of scores, a softmax in float32 rounded to the activations' dtype. Nothing of `mlakit.nn` is used.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mlakit.quant.reference import act_quant_reference, fp8_gemm_reference, weight_dequant_reference

BLOCK = 128


class BlockLinear(nn.Module):
    """x @ weight.T without bias; a float8 weight has a float32 scale for each block of 128 x 128."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, gemm_impl: str) -> None:
        super().__init__()
        self.gemm_impl = gemm_impl
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=dtype), requires_grad=dtype.itemsize > 1)
        blocks = (math.ceil(outputs / BLOCK), math.ceil(inputs / BLOCK))
        scale = nn.Parameter(torch.ones(blocks), requires_grad=False) if dtype.itemsize == 1 else None
        self.register_parameter("scale", scale)

    def wide(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, dequantized if need be."""
        return self.weight if self.scale is None else weight_dequant_reference(self.weight, self.scale, BLOCK, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None or self.gemm_impl == "bf16":
            return F.linear(x, self.wide(x.dtype))
        return fp8_gemm_reference(*act_quant_reference(x, BLOCK), self.weight, self.scale, x.dtype)


class RMS(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, dim: int, dtype: torch.dtype, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotation_table(args: Any) -> torch.Tensor:
    """Rotations of all positions, complex64 [max_seq_len, rope / 2], YaRN's where max_seq_len exceeds the length that
    the model was trained on.
    """
    dim, base = args.qk_rope_head_dim, args.rope_theta
    freqs = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if args.max_seq_len > args.original_seq_len:

        def dimension_of(turns: float) -> float:
            return dim * math.log(args.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(dimension_of(args.beta_fast)), 0)
        high = min(math.ceil(dimension_of(args.beta_slow)), dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
        stretched = ramp.clamp(0, 1)
        freqs = freqs / args.rope_factor * stretched + freqs * (1 - stretched)
    angles = torch.outer(torch.arange(args.max_seq_len), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def rotary(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Elements 2i and 2i + 1 of x [bsz, seqlen, heads, rope] as a complex number, times row t of `table` for token
    t.
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * table[None, :, None, :]
    return torch.view_as_real(turned).flatten(3).to(x.dtype)


class DeepSeekMLA(nn.Module):
    """The layer, "naive" or "absorb"; its state dict has the names of DeepSeek's inference checkpoints.

    Args:
        args: anything with the fields of DeepSeek's `ModelArgs` (`mlakit.nn.Args` is).
        attn_impl: "naive" caches keys and values of every head, "absorb" the latent and the rotated key.
        dtype: of the weights, except that `args.dtype == "fp8"` makes the linear ones float8; of the caches too.
        eps: of the norms.
    """

    first_cache: torch.Tensor
    second_cache: torch.Tensor

    def __init__(self, args: Any, attn_impl: str, dtype: torch.dtype = torch.bfloat16, eps: float = 1e-6) -> None:
        super().__init__()
        assert attn_impl in ("naive", "absorb")
        self.args, self.attn_impl, self.dtype = args, attn_impl, dtype
        self.heads, self.nope, self.rope, self.v_dim = (
            args.n_heads, args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim
        )  # fmt: skip
        self.rank, self.qk_dim = args.kv_lora_rank, self.nope + self.rope
        weights = torch.float8_e4m3fn if args.dtype == "fp8" else dtype

        def linear(inputs: int, outputs: int) -> BlockLinear:
            return BlockLinear(inputs, outputs, weights, getattr(args, "gemm_impl", "bf16"))

        if args.q_lora_rank:
            self.wq_a = linear(args.dim, args.q_lora_rank)
            self.q_norm = RMS(args.q_lora_rank, dtype, eps)
            self.wq_b = linear(args.q_lora_rank, self.heads * self.qk_dim)
        else:
            self.wq = linear(args.dim, self.heads * self.qk_dim)
        self.wkv_a = linear(args.dim, self.rank + self.rope)
        self.kv_norm = RMS(self.rank, dtype, eps)
        self.wkv_b = linear(self.rank, self.heads * (self.nope + self.v_dim))
        self.wo = linear(self.heads * self.v_dim, args.dim)
        self.softmax_scale = self.qk_dim**-0.5
        if args.max_seq_len > args.original_seq_len:
            self.softmax_scale *= (0.1 * args.mscale * math.log(args.rope_factor) + 1.0) ** 2
        widths: list[tuple[int, ...]] = [(self.heads, self.qk_dim), (self.heads, self.v_dim)]
        if attn_impl == "absorb":
            widths = [(self.rank,), (self.rope,)]
        for name, width in zip(("first_cache", "second_cache"), widths, strict=True):
            room = torch.zeros(args.max_batch_size, args.max_seq_len, *width, dtype=dtype)
            self.register_buffer(name, room, persistent=False)

    def forward(
        self, x: torch.Tensor, start_pos: int, freqs_cis: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """x [bsz, seqlen, dim] after `start_pos` tokens in the cache; freqs_cis: the new tokens' rows; mask [seqlen,
        end] is added to the scores, None hides nothing.
        """
        bsz, seqlen, _ = x.shape
        end = start_pos + seqlen
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.args.q_lora_rank else self.wq(x)
        q_nope, q_pe = q.view(bsz, seqlen, self.heads, self.qk_dim).split((self.nope, self.rope), dim=-1)
        q_pe = rotary(q_pe, freqs_cis)
        latent, k_pe = self.wkv_a(x).split((self.rank, self.rope), dim=-1)
        latent, k_pe = self.kv_norm(latent), rotary(k_pe.unsqueeze(2), freqs_cis)
        attend = self._naive if self.attn_impl == "naive" else self._absorb
        out = attend(q_nope, q_pe, latent, k_pe, start_pos, end, mask)
        return self.wo(out.flatten(2))

    def _naive(self, q_nope, q_pe, latent, k_pe, start, end, mask):
        bsz, seqlen = q_nope.shape[:2]
        q = torch.cat((q_nope, q_pe), dim=-1)
        kv = self.wkv_b(latent).view(bsz, seqlen, self.heads, self.nope + self.v_dim)
        k_nope, v = kv.split((self.nope, self.v_dim), dim=-1)
        k = torch.cat((k_nope, k_pe.expand(-1, -1, self.heads, -1)), dim=-1)
        k, v = self._cached(k, v, start, end)
        scores = torch.einsum("bshd,bthd->bsht", q, k) * self.softmax_scale
        return torch.einsum("bsht,bthd->bshd", self._softmax(scores, mask, q.dtype), v)

    def _absorb(self, q_nope, q_pe, latent, k_pe, start, end, mask):
        up = self.wkv_b.wide(q_nope.dtype).view(self.heads, self.nope + self.v_dim, self.rank)
        q_latent = torch.einsum("bshd,hdc->bshc", q_nope, up[:, : self.nope])
        latents, rotated = self._cached(latent, k_pe.squeeze(2), start, end)
        scores = torch.einsum("bshc,btc->bsht", q_latent, latents) + torch.einsum("bshr,btr->bsht", q_pe, rotated)
        weights = self._softmax(scores * self.softmax_scale, mask, q_nope.dtype)
        return torch.einsum("bshc,hdc->bshd", torch.einsum("bsht,btc->bshc", weights, latents), up[:, self.nope :])

    def _cached(self, first, second, start, end):
        """Write the new tokens, return all of them. Where a gradient is wanted there is nothing before the new ones."""
        if torch.is_grad_enabled() and first.requires_grad:
            assert start == 0
            return first, second
        bsz = first.shape[0]
        self.first_cache[:bsz, start:end] = first
        self.second_cache[:bsz, start:end] = second
        return self.first_cache[:bsz, :end], self.second_cache[:bsz, :end]

    @staticmethod
    def _softmax(scores, mask, dtype):
        if mask is not None:
            scores += mask.unsqueeze(1)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return scores.softmax(dim=-1, dtype=compute).to(dtype)
