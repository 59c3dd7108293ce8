"""Flags that the studies of the layer share, and what they mean on this device. torch is imported only when they are
checked.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mlakit.dims import MLA_PRESETS, MLADims, nearest
from mlakit.studies.flag_values import parse_device, positive, whole, whole_numbers

IMPLEMENTATIONS = ("naive", "absorb", "naive+flash", "fused")
DTYPES = ("bf16", "fp8")
_DTYPE_ALIASES = {"bfloat16": "bf16", "float8_e4m3fn": "fp8"}
TOLERANCE = 1.5e-2
# Emptying a CPU's cache before each call takes longer than a small call.
CPU_TRIALS = 5
# e4m3 has three bits of fraction, an error of 2.6% of a value on average, and the errors of the layer's products add
# up: 0.05 to 0.07 for the model "tiny".
FP8_TOLERANCE = 0.1
# A single token's error scatters: in bf16 the worst of 2048 tokens is 1.5 to 3.5 times as far off as all together.
WORST_TOKEN = 4


@dataclass(frozen=True)
class Model:
    """Of a model's layer, what `MLADims` does not say: width of the hidden state, query rank (0: none), rope."""

    dim: int
    q_lora_rank: int
    rope: Mapping[str, Any] = field(default_factory=dict)


# From each model's published config.json.
MODELS: dict[str, Model] = {
    "deepseek-v2": Model(5120, 1536, {"mscale": 0.707}),
    "deepseek-v2-lite": Model(2048, 0, {"mscale": 0.707}),
    "deepseek-v3": Model(7168, 1536),
    "deepseek-r1": Model(7168, 1536),
    "deepseek-v3.2": Model(7168, 1536),
    "kimi-k2": Model(7168, 1536, {"rope_theta": 50000.0, "rope_factor": 32.0}),
    "glm-5": Model(6144, 2048, {"rope_theta": 1e6, "yarn": False}),
    "tiny": Model(256, 96),  # no model: V3's proportions, for any machine
}
GPU_MODEL, CPU_MODEL = "deepseek-v2-lite", "tiny"


@dataclass(frozen=True)
class Shape:
    """The dimensions of one layer."""

    dim: int
    q_lora_rank: int
    dims: MLADims
    rope: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """For tables and plots."""
        d = self.dims
        return (
            f"dim {self.dim}, {d.num_heads} heads, nope {d.qk_nope_head_dim}, rope {d.qk_rope_head_dim}, "
            f"v {d.v_head_dim}, ranks q {self.q_lora_rank or '-'} kv {d.kv_lora_rank}"
        )

    @property
    def slug(self) -> str:
        """For file names: what the lists of flags can vary."""
        d = self.dims
        return f"h{d.num_heads}_nope{d.qk_nope_head_dim}_rope{d.qk_rope_head_dim}_v{d.v_head_dim}"

    def fields(self) -> dict[str, Any]:
        """As `mlakit.nn.Args` names them."""
        return {
            "dim": self.dim,
            "n_heads": self.dims.num_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.dims.kv_lora_rank,
            "qk_nope_head_dim": self.dims.qk_nope_head_dim,
            "qk_rope_head_dim": self.dims.qk_rope_head_dim,
            "v_head_dim": self.dims.v_head_dim,
            **dict(self.rope),
        }


@dataclass(frozen=True)
class Options:
    """What every study of the layer needs to know."""

    model: str
    shapes: tuple[Shape, ...]
    implementations: tuple[str, ...]
    dtype: str
    gemm_impl: str
    cache_dtype: str
    device: str
    trials: int | None
    warmup: int
    tolerance: float
    seed: int

    @property
    def is_cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device != "cpu"


def add_common_arguments(parser: argparse.ArgumentParser, *, many_shapes: bool = False) -> None:
    """Add the flags that all studies of the layer take; with `many_shapes`, lists of head dimensions."""
    several: dict[str, Any] = {"nargs": "+"} if many_shapes else {}
    group = parser.add_argument_group("the layer")
    group.add_argument(
        "--model",
        help=f"its dimensions: {', '.join(MODELS)} (default: {GPU_MODEL}; on a CPU {CPU_MODEL}); "
        "the flags below override them",
    )
    group.add_argument("--dim", metavar="N", help="width of the hidden state")
    group.add_argument("--heads", metavar="N", **several, help="number of attention heads")
    group.add_argument("--rope-dims", metavar="N", **several, help="width of a head's part with rope")
    group.add_argument("--nope-dims", metavar="N", **several, help="width of a head's part without rope")
    group.add_argument("--v-dims", metavar="N", **several, help="width of a head's value")
    group.add_argument("--q-lora-rank", metavar="N", help="rank of the query's down-projection; 0 for none")
    group.add_argument("--kv-lora-rank", metavar="N", help="rank of the latent of keys and values")
    group.add_argument(
        "--dtype", default="bf16", help="weights: bf16, or fp8 with 128 x 128 block scales (default: %(default)s)"
    )
    group.add_argument(
        "--gemm-impl", default="bf16", help="how fp8 weights multiply: bf16 or fp8 (default: %(default)s)"
    )
    group.add_argument(
        "--cache-dtype", default="bf16", help="of absorb's and fused's cache: bf16 or fp8 (default: %(default)s)"
    )
    group = parser.add_argument_group("the measuring")
    group.add_argument("--device", default="auto", help="cuda:0, cpu, or auto: cuda:0 if there is one (default)")
    group.add_argument(
        "--trials",
        metavar="N",
        help=f"timed calls (default: as many as fit in a part of a second; on a CPU {CPU_TRIALS})",
    )
    group.add_argument("--warmup", metavar="N", default="3", help="untimed calls first (default: %(default)s)")
    group.add_argument(
        "--tolerance",
        metavar="X",
        help=f"largest relative difference of outputs that passes; of a single token's, {WORST_TOKEN} times that "
        f"(default: {TOLERANCE}; {FP8_TOLERANCE} with --gemm-impl fp8 or --cache-dtype fp8)",
    )
    group.add_argument("--seed", metavar="N", default="0", help="of the random weights and inputs (default: 0)")


def add_implementations(parser: argparse.ArgumentParser) -> None:
    """Add `--implementations`."""
    parser.add_argument(
        "--implementations",
        nargs="+",
        metavar="NAME",
        default=list(IMPLEMENTATIONS),
        help=f"{', '.join(IMPLEMENTATIONS)} (default: all)",
    )


def parse_common(args: argparse.Namespace) -> Options:
    """Check the flags of `add_common_arguments`, and fill in the defaults of the device.

    Raises:
        ValueError: a flag's value makes no sense; the message names it.
    """
    device = parse_device(args.device)
    model = args.model or (CPU_MODEL if device == "cpu" else GPU_MODEL)
    if model not in MODELS:
        raise ValueError(f"--model: unknown model {model!r}; {nearest(model, MODELS)}")
    dtype, gemm, cache = (
        _choice(flag, _DTYPE_ALIASES.get(value, value), DTYPES)
        for flag, value in (
            ("--dtype", args.dtype),
            ("--gemm-impl", args.gemm_impl),
            ("--cache-dtype", args.cache_dtype),
        )
    )
    if gemm == "fp8" and dtype != "fp8":
        raise ValueError("--gemm-impl: fp8 needs fp8 weights (--dtype fp8)")
    names = getattr(args, "implementations", IMPLEMENTATIONS)
    trials = CPU_TRIALS if device == "cpu" else None
    if args.trials is not None:
        trials = whole("--trials", args.trials, 1)
    tolerance = args.tolerance or (FP8_TOLERANCE if "fp8" in (gemm, cache) else TOLERANCE)
    return Options(
        model=model,
        shapes=_shapes(args, model),
        implementations=tuple(dict.fromkeys(_choice("--implementations", name, IMPLEMENTATIONS) for name in names)),
        dtype=dtype,
        gemm_impl=gemm,
        cache_dtype=cache,
        device=device,
        trials=trials,
        warmup=whole("--warmup", args.warmup, 0),
        tolerance=positive("--tolerance", tolerance),
        seed=whole("--seed", args.seed, 0),
    )


def _shapes(args: argparse.Namespace, model: str) -> tuple[Shape, ...]:
    base, known = MLA_PRESETS[model], MODELS[model]

    def numbers(flag: str, given: str | Sequence[str] | None, default: int, least: int = 1) -> list[int]:
        values = [given] if isinstance(given, str) else given
        return [default] if values is None else whole_numbers(flag, values, least, keep_order=True)

    (dim,) = numbers("--dim", args.dim, known.dim)
    (q_rank,) = numbers("--q-lora-rank", args.q_lora_rank, known.q_lora_rank, 0)
    (kv_rank,) = numbers("--kv-lora-rank", args.kv_lora_rank, base.kv_lora_rank)
    ropes = numbers("--rope-dims", args.rope_dims, base.qk_rope_head_dim)
    for rope in ropes:
        if rope % 2:
            raise ValueError(f"--rope-dims: expected even numbers, as rope turns pairs, got {rope}")
    combinations = product(
        numbers("--heads", args.heads, base.num_heads),
        numbers("--nope-dims", args.nope_dims, base.qk_nope_head_dim),
        ropes,
        numbers("--v-dims", args.v_dims, base.v_head_dim),
    )
    return tuple(
        Shape(dim, q_rank, MLADims(heads, kv_rank, nope, rope, v), tuple(known.rope.items()))
        for heads, nope, rope, v in combinations
    )


def _choice(flag: str, value: str, valid: Sequence[str]) -> str:
    if value not in valid:
        raise ValueError(f"{flag}: unknown name {value!r}; {nearest(value, valid)}")
    return value
