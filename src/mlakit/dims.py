"""The dimensions of attention: what a model fixes, named as DeepSeek's configs name it."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown name: the closest valid one if there is a close one, and all of them."""
    known = sorted(valid)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}valid: {', '.join(known)}"


@dataclass(frozen=True)
class MLADims:
    """Dimensions of a Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    In *MHA mode* each of `num_heads` heads has keys of `qk_head_dim` and values of `v_head_dim`; in *MQA mode* the
    up-projection of keys is absorbed into the query, and all heads share one key of `latent_dim`, whose first
    `kv_lora_rank` entries are the value.

    Raises:
        ValueError: a dimension is not a positive whole number, or `qk_rope_head_dim` is odd (rope turns pairs).
    """

    num_heads: int
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, as rope turns pairs; got {self.qk_rope_head_dim}")

    @property
    def latent_dim(self) -> int:
        """Width of a cached token: the compressed latent and the rotated key part (576)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head in MHA mode (192)."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(qk_head_dim): the scale of the model, in both modes, before any YaRN factor."""
        return self.qk_head_dim**-0.5


@dataclass(frozen=True)
class StandardDims:
    """Dimensions of standard (multi-head, grouped-query or multi-query) attention.

    Raises:
        ValueError: a dimension is not a positive whole number, or `num_q_heads` is no multiple of `num_kv_heads`.
    """

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads must be a multiple of num_kv_heads, got {self.num_q_heads} and {self.num_kv_heads}"
            )

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(head_dim)."""
        return self.head_dim**-0.5


def _require_positive(dims: MLADims | StandardDims) -> None:
    for field in dataclasses.fields(dims):
        value = getattr(dims, field.name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")


# From each model's published config.json.
MLA_PRESETS: dict[str, MLADims] = {
    "deepseek-v2": MLADims(num_heads=128),
    "deepseek-v2-lite": MLADims(num_heads=16),
    "deepseek-v3": MLADims(num_heads=128),
    "deepseek-r1": MLADims(num_heads=128),
    "deepseek-v3.2": MLADims(num_heads=128),
    "kimi-k2": MLADims(num_heads=64),
    "glm-5": MLADims(num_heads=64, qk_nope_head_dim=192, v_head_dim=256),
    # No model: the proportions of DeepSeek-V3 at a size that any machine attends to in milliseconds.
    "tiny": MLADims(num_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
}

STANDARD_PRESETS: dict[str, StandardDims] = {
    "llama-3-8b": StandardDims(num_q_heads=32, num_kv_heads=8, head_dim=128),
    "llama-3-70b": StandardDims(num_q_heads=64, num_kv_heads=8, head_dim=128),
    "qwen3-32b": StandardDims(num_q_heads=64, num_kv_heads=8, head_dim=128),
    "tiny-gqa": StandardDims(num_q_heads=4, num_kv_heads=2, head_dim=32),
}


def preset(name: str) -> MLADims | StandardDims:
    """The dimensions of a named model.

    Raises:
        ValueError: no preset has this name; the message gives the nearest and lists all.
    """
    found = MLA_PRESETS.get(name) or STANDARD_PRESETS.get(name)
    if found is None:
        raise ValueError(f"unknown model {name!r}; {nearest(name, [*MLA_PRESETS, *STANDARD_PRESETS])}")
    return found
