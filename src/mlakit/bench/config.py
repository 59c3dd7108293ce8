"""`BenchmarkConfig`: everything that one row of a run depends on. No torch here."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from mlakit.backends.base import Attention
from mlakit.backends.registry import attention_kinds, check_name
from mlakit.bench.batch_spec import BatchRequest, parse_batch_spec
from mlakit.dims import MLADims, StandardDims, preset

DEFAULT_MLA_MODEL = "deepseek-v3"
# What a row's numbers do not depend on: left out of its key, so that `--resume` finds it all the same.
_NOT_MEASURED = {"timeout", "label", "batch_name"}
RECORDED = "recorded"  # pydantic's validation context of a config that is read back from a record
_MLA_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def infer_attention(model: str | None, kinds: list[frozenset[Attention]]) -> Attention:
    """MLA or standard: as the model says, else MLA if a backend can do nothing else or none is named, else what all do.

    Raises:
        ValueError: unknown model.
    """
    if model is not None:
        return "mla" if isinstance(preset(model), MLADims) else "standard"
    if not kinds or any(k == {"mla"} for k in kinds):
        return "mla"
    return "standard" if all("standard" in k for k in kinds) else "mla"


class BenchmarkConfig(BaseModel):
    """One backend on one batch with one set of settings.

    Only `backend` and `batch_spec` are required. What is measured, MLA or standard attention, follows from `attention`,
    else from `model`, else from the backend; dimensions come from the model's preset and whatever is given beside it.
    For MLA `head_dim` is the width of the cached latent (576) and `num_kv_heads` is 1. `repeats=None` takes as many
    samples as half a second of timed work holds.

    Raises:
        ValueError: anything in it cannot be meant (pydantic's ValidationError is one).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    backend: str
    batch_spec: str
    # Never None: `_complete` fills in what is not given.
    attention: Attention = None  # type: ignore[assignment]
    model: str | None = None
    num_q_heads: int = Field(default=None, ge=1)  # type: ignore[assignment]
    num_kv_heads: int = Field(default=None, ge=1)  # type: ignore[assignment]
    head_dim: int = Field(default=None, ge=1)  # type: ignore[assignment]
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_layers: int = Field(default=4, ge=1)
    block_size: int = Field(default=64, ge=1)
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    device: str = "auto"
    repeats: int | None = Field(default=None, ge=1)
    warmup_iters: int = Field(default=3, ge=0)
    profile_memory: bool = False
    l2: Literal["cold", "hot"] = "cold"
    cuda_graph: bool = False
    scope: Literal["attention", "pipeline"] = "attention"
    pipeline: Literal["auto", "decode", "prefill"] = "auto"
    reorder_batch_threshold: int | Literal["auto"] = "auto"
    parameters: dict[str, int | str] = {}
    check: bool = True
    seed: int = 0
    timeout: float = Field(default=300.0, gt=0)
    label: str | None = None
    batch_name: str | None = None  # what to call a batch whose spec is too long to read

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any, info: ValidationInfo) -> Any:
        if info.context == RECORDED:
            return data  # complete already, and its backend need not be installed on the machine that reads it
        if not isinstance(data, dict) or not data.get("backend") or not data.get("batch_spec"):
            return data  # pydantic names what is missing
        data = dict(data)
        data["backend"] = check_name(str(data["backend"]))
        if data.get("attention") is None:
            data["attention"] = infer_attention(data.get("model"), [attention_kinds(data["backend"])])
        return complete_dims(data)

    @model_validator(mode="after")
    def _consistent(self) -> "BenchmarkConfig":
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two, got {self.block_size}")
        self.requests()
        self.dims()
        return self

    def dims(self) -> MLADims | StandardDims:
        """The dimensions to attend with."""
        if self.attention == "standard":
            return StandardDims(self.num_q_heads, self.num_kv_heads, self.head_dim)
        fields = {name: getattr(self, name) for name in _MLA_FIELDS}
        return MLADims(num_heads=self.num_q_heads, **fields)

    def requests(self) -> list[BatchRequest]:
        """The batch's requests."""
        return parse_batch_spec(self.batch_spec)

    @property
    def title(self) -> str:
        """What the row is called beside others: the sweep's label, or the backend's name."""
        return self.label or self.backend

    @property
    def batch_title(self) -> str:
        """What the batch is called in tables and plots: its name, or its spec."""
        return self.batch_name or self.batch_spec

    @property
    def comparison(self) -> tuple[object, ...]:
        """Equal for configs that measure the same job, so that their times may be compared."""
        dims = (self.num_q_heads, self.num_kv_heads, self.head_dim, *(getattr(self, name) for name in _MLA_FIELDS))
        return (self.batch_spec, self.attention, dims, self.dtype, self.scope, self.l2)

    @property
    def key(self) -> str:
        """Identifies the row: equal for configs that measure the same thing."""
        content = {k: v for k, v in self.model_dump(mode="json").items() if k not in _NOT_MEASURED}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def complete_dims(data: dict[str, Any]) -> dict[str, Any]:
    """Fill in the dimensions that a model fixes; what is given beside it wins.

    Raises:
        ValueError: unknown model, a model of the other kind of attention, or sizes that contradict each other.
    """
    for name in ("num_q_heads", "num_kv_heads", "head_dim", *_MLA_FIELDS):
        value = data.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
    model, attention = data.get("model"), data["attention"]
    base = preset(model) if model is not None else preset(DEFAULT_MLA_MODEL) if attention == "mla" else StandardDims()
    if isinstance(base, MLADims) != (attention == "mla"):
        has = "MLA" if isinstance(base, MLADims) else "standard attention"
        raise ValueError(f"model {model!r} has {has}, and {attention} was asked for")
    if isinstance(base, StandardDims):
        given = [name for name in _MLA_FIELDS if data.get(name) is not None]
        if given:
            raise ValueError(f"{given[0]} belongs to MLA, and what is measured is standard attention")
        defaults = {"num_q_heads": base.num_q_heads, "num_kv_heads": base.num_kv_heads, "head_dim": base.head_dim}
        return {**data, **{k: v for k, v in defaults.items() if data.get(k) is None}}
    for name in _MLA_FIELDS:
        if data.get(name) is None:
            data[name] = getattr(base, name)
    if data.get("num_q_heads") is None:
        data["num_q_heads"] = base.num_heads
    latent = data["kv_lora_rank"] + data["qk_rope_head_dim"]
    for name, right in (("num_kv_heads", 1), ("head_dim", latent)):
        given_value = data.get(name)
        if given_value is not None and given_value != right:
            why = "all heads share one latent key" if name == "num_kv_heads" else "kv_lora_rank + qk_rope_head_dim"
            raise ValueError(f"{name} is {right} in MLA ({why}), got {given_value}")
        data[name] = right
    if data.get("model") is None:
        data["model"] = DEFAULT_MLA_MODEL
    return data
