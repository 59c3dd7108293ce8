"""What an MLA layer is made of: `Args`, named and defaulted as DeepSeek's inference code names and defaults them."""

import math
from dataclasses import dataclass, fields

from mlakit.dims import MLADims, nearest

ATTN_IMPLS = ("naive", "absorb", "naive+flash", "fused")

_POSITIVE = (
    "max_batch_size",
    "max_seq_len",
    "dim",
    "n_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "original_seq_len",
    "page_size",
)
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "dtype": ("bf16", "fp8"),
    "attn_impl": ATTN_IMPLS,
    "gemm_impl": ("bf16", "fp8"),
    "scale_fmt": (None, "ue8m0"),
    "cache_dtype": ("bf16", "fp8"),
}


@dataclass(frozen=True)
class Args:
    """The configuration of an MLA layer. Fields that DeepSeek's `ModelArgs` has mean what they mean there.

    Attributes:
        max_batch_size: requests that the layer's own cache has room for.
        max_seq_len: tokens of a request that the layer's own cache and its rope table have room for.
        dtype: of the linear weights: "bf16", or "fp8" (float8_e4m3fn with a float32 scale for each 128 x 128 block).
        attn_impl: "naive", "absorb", "naive+flash" or "fused".
        dim: width of the hidden state.
        n_heads: query heads.
        q_lora_rank: rank of the query's down-projection; 0 for a query projected in one step.
        kv_lora_rank: rank of the keys' and values' latent.
        qk_nope_head_dim: of a head's query and key, the part without rope.
        qk_rope_head_dim: of a head's query, and of the key that all heads share, the part with rope.
        v_head_dim: of a head's value.
        rope_theta: base of the rotary frequencies.
        rope_factor: by how much YaRN stretches the context.
        beta_fast: YaRN: rotations within the original context above which a frequency is left as it is.
        beta_slow: YaRN: rotations below which a frequency is divided by `rope_factor`.
        mscale: YaRN: strength of the correction of the scores.
        mscale_all_dim: YaRN, as in Hugging Face's configs, where `mscale` then belongs to the rope part alone; None is
            equal to `mscale`, as in every published DeepSeek model.
        original_seq_len: YaRN: context that the model was trained on before it was stretched.
        yarn: apply YaRN; None does as DeepSeek's code, when `max_seq_len` exceeds `original_seq_len`.
        eps: of the RMSNorms.
        gemm_impl: how fp8 weights multiply: "bf16" dequantizes the weight, "fp8" quantizes the activations.
        scale_fmt: scales of quantized activations and of the fp8 cache: None for float32, "ue8m0" for powers of two.
        cache_dtype: of the latent cache that absorb and fused keep: "bf16" (the activations' dtype) or "fp8", the row
            of 656 bytes for DeepSeek's dimensions.
        page_size: tokens of a page of the latent cache.
        fast_path_tokens: longest sequence that naive attends to by its short path; 0 turns that off.

    Raises:
        ValueError: a field is out of range or unknown; the message names the field and what it may be.

    Source: DeepSeek-V3, inference/model.py; YaRN (arXiv:2309.00071).
    """

    max_batch_size: int = 8
    max_seq_len: int = 4096 * 4
    dtype: str = "bf16"
    attn_impl: str = "absorb"
    dim: int = 2048
    n_heads: int = 16
    q_lora_rank: int = 0
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_factor: float = 40.0
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float | None = None
    original_seq_len: int = 4096
    yarn: bool | None = None
    eps: float = 1e-6
    gemm_impl: str = "bf16"
    scale_fmt: str | None = None
    cache_dtype: str = "bf16"
    page_size: int = 64
    fast_path_tokens: int = 256

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _require_whole(name, getattr(self, name), 1)
        for name in ("q_lora_rank", "fast_path_tokens"):
            _require_whole(name, getattr(self, name), 0)
        for name in ("rope_theta", "rope_factor", "beta_fast", "beta_slow", "eps"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                shown = nearest(str(value), [c for c in choices if c is not None])
                raise ValueError(f"{name} cannot be {value!r}; {shown}{' or None' if None in choices else ''}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, as rope turns pairs; got {self.qk_rope_head_dim}")
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {self.page_size}")
        if self.gemm_impl == "fp8" and self.dtype != "fp8":
            raise ValueError(f"gemm_impl='fp8' needs fp8 weights (dtype='fp8'), got dtype={self.dtype!r}")
        if self.cache_dtype == "fp8" and self.attn_impl not in ("absorb", "fused"):
            raise ValueError(f"cache_dtype='fp8' is for absorb and fused, got attn_impl={self.attn_impl!r}")
        if self.cache_dtype == "fp8" and self.kv_lora_rank % 128:
            raise ValueError(
                f"cache_dtype='fp8' needs a kv_lora_rank that is a multiple of 128, got {self.kv_lora_rank}"
            )

    @property
    def dims(self) -> MLADims:
        """The dimensions of the attention alone."""
        return MLADims(
            num_heads=self.n_heads,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a token in the latent cache."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def uses_yarn(self) -> bool:
        """Whether the rope table and the softmax scale are YaRN's."""
        return self.max_seq_len > self.original_seq_len if self.yarn is None else self.yarn

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(qk_head_dim), times the square of YaRN's correction where YaRN is used."""
        if not self.uses_yarn:
            return self.qk_head_dim**-0.5
        strength = self.mscale if self.mscale_all_dim is None else self.mscale_all_dim
        return self.qk_head_dim**-0.5 * yarn_mscale(self.rope_factor, strength) ** 2

    @property
    def rope_amplitude(self) -> float:
        """What the rope table is multiplied by: 1 unless `mscale` and `mscale_all_dim` differ."""
        if not self.uses_yarn or self.mscale_all_dim is None:
            return 1.0
        return yarn_mscale(self.rope_factor, self.mscale) / yarn_mscale(self.rope_factor, self.mscale_all_dim)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's correction for a context stretched by `factor`: 0.1 * mscale * ln(factor) + 1, or 1 if nothing is
    stretched.
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _require_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


FIELDS = tuple(field.name for field in fields(Args))
