"""Flags of the study `k-concat`, and what they mean on this device. torch is imported only when they are checked."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlakit.dims import MLA_PRESETS, MLADims, nearest
from mlakit.studies.checkpoint import add_run_arguments
from mlakit.studies.flag_values import parse_device, whole

# DeepSeek-V3's dimensions.
NUM_HEADS = 128
QK_NOPE_HEAD_DIM = 128
PE_DIM = 64

BATCH_SIZES = tuple(2**i for i in range(5, 17))  # 32 to 65536
# A CPU moves a hundredth of a GPU's bytes: the whole list would take an hour and 10 GB.
CPU_BATCH_SIZES = (32, 64, 128, 256, 512)
NUM_WARMUP, NUM_ITERS = 10, 100
CPU_NUM_ITERS = 20

DTYPES = ("bfloat16", "float8_e4m3fn", "float16", "float32")
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "fp16": "float16", "fp32": "float32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's flags to a parser."""
    parser.add_argument(
        "--dims",
        default=f"{NUM_HEADS},{QK_NOPE_HEAD_DIM},{PE_DIM}",
        metavar="MODEL|H,DN,DR",
        help="a model (deepseek-v3, kimi-k2, ...) or heads, width of k_nope, width of k_pe (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        metavar="B",
        help="tokens (default: 32 to 65536 in powers of two; on a CPU 32 to 512)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        metavar="DTYPE",
        default=["bfloat16", "float8_e4m3fn"],
        help=f"{', '.join(DTYPES)} (default: bfloat16 float8_e4m3fn)",
    )
    parser.add_argument("--device", default="auto", help="cuda:0, cpu, or auto: cuda:0 if there is one (default)")
    parser.add_argument("--num-warmup", metavar="N", help=f"untimed calls first (default: {NUM_WARMUP})")
    parser.add_argument(
        "--num-iters", metavar="N", help=f"timed calls (default: {NUM_ITERS}; on a CPU {CPU_NUM_ITERS})"
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="save everything measured as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a plot as PNG")
    add_run_arguments(parser)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    heads: int
    nope: int
    rope: int
    batch_sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    device: str
    num_warmup: int
    num_iters: int


def parse_options(args: argparse.Namespace) -> Options:
    """Check the flags, and fill in the defaults of the device.

    Raises:
        ValueError: a flag's value makes no sense; the message names it.
    """
    heads, nope, rope = _parse_dims(args.dims)
    dtypes = tuple(dict.fromkeys(_DTYPE_ALIASES.get(name, name) for name in args.dtypes))
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(f"--dtypes: unknown dtype {name!r}; {nearest(name, [*DTYPES, *_DTYPE_ALIASES])}")
    device = parse_device(args.device)
    cpu = device == "cpu"
    sizes: Sequence[Any] = args.batch_sizes or (CPU_BATCH_SIZES if cpu else BATCH_SIZES)
    return Options(
        heads=heads,
        nope=nope,
        rope=rope,
        batch_sizes=tuple(sorted({whole("--batch-sizes", size, 1) for size in sizes})),
        dtypes=dtypes,
        device=device,
        num_warmup=whole("--num-warmup", args.num_warmup or NUM_WARMUP, 0),
        num_iters=whole("--num-iters", args.num_iters or (CPU_NUM_ITERS if cpu else NUM_ITERS), 1),
    )


def _parse_dims(text: str) -> tuple[int, int, int]:
    if text[:1].isdigit() or "," in text:
        parts = text.split(",")
        if len(parts) != 3:
            raise ValueError(f"--dims: expected three numbers H,DN,DR, got {text!r}")
        heads, nope, rope = (whole("--dims", part, 1) for part in parts)
        return heads, nope, rope
    model: MLADims | None = MLA_PRESETS.get(text)
    if model is None:
        raise ValueError(f"--dims: unknown model {text!r}; {nearest(text, MLA_PRESETS)}, or three numbers H,DN,DR")
    return model.num_heads, model.qk_nope_head_dim, model.qk_rope_head_dim
