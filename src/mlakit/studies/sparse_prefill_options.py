"""Flags of the study `sparse-prefill`, and what they mean on this device. torch is imported only when they are
checked.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlakit.studies.checkpoint import add_run_arguments
from mlakit.studies.flag_values import parse_device, whole

# s_q, s_kv, topk
CONFIGS = (
    (1024, 4096, 512),
    (2048, 8192, 1024),
    (4096, 16384, 2048),
    (4096, 32768, 2048),
    (4096, 65536, 2048),
    (4096, 131072, 2048),
)
# The same proportions for a CPU, which does a thousandth of the work in a second.
CPU_CONFIGS = ((8, 128, 16), (16, 256, 32), (32, 512, 64), (32, 1024, 64), (32, 2048, 64), (32, 4096, 64))
HEADS, CPU_HEADS = 128, 8
D_QK, D_V = 576, 512
MHA_D_QK, MHA_D_V = 192, 128  # what the latent is expanded to
WARMUP, REP = 5, 20
CPU_WARMUP, CPU_REP = 1, 3
PLOT = Path("sparse_mla_performance.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's flags to a parser."""
    parser.add_argument(
        "--configs",
        nargs="+",
        metavar="S_Q,S_KV,TOPK",
        help="queries, keys and keys attended to (default: 1024,4096,512 to 4096,131072,2048; on a CPU 8,128,16 to "
        "32,4096,64)",
    )
    parser.add_argument("--heads", metavar="N", help=f"query heads (default: {HEADS}; on a CPU {CPU_HEADS})")
    parser.add_argument("--device", default="auto", help="cuda:0, cpu, or auto: cuda:0 if there is one (default)")
    parser.add_argument("--warmup", metavar="N", help=f"untimed calls first (default: {WARMUP}; on a CPU {CPU_WARMUP})")
    parser.add_argument("--rep", metavar="N", help=f"timed calls (default: {REP}; on a CPU {CPU_REP})")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense implementations out")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="save everything measured as JSON")
    parser.add_argument("--output-csv", type=Path, metavar="FILE", help="save the summary table as CSV")
    parser.add_argument(
        "--plot", type=Path, nargs="?", const=PLOT, metavar="FILE", help=f"save a plot as PNG (without FILE: {PLOT})"
    )
    add_run_arguments(parser)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    configs: tuple[tuple[int, int, int], ...]
    heads: int
    device: str
    warmup: int
    rep: int
    dense: bool

    @property
    def is_cuda(self) -> bool:
        """Whether it is measured on a GPU."""
        return self.device != "cpu"


def parse_options(args: argparse.Namespace) -> Options:
    """Check the flags, and fill in the defaults of the device.

    Raises:
        ValueError: a flag's value makes no sense; the message names it.
    """
    device = parse_device(args.device)
    cpu = device == "cpu"

    def count(flag: str, given: Any, default: int, least: int) -> int:
        return default if given is None else whole(flag, given, least)

    configs: tuple[tuple[int, int, int], ...] = CPU_CONFIGS if cpu else CONFIGS
    if args.configs is not None:
        configs = tuple(dict.fromkeys(_config(text) for text in args.configs))
    return Options(
        configs=configs,
        heads=count("--heads", args.heads, CPU_HEADS if cpu else HEADS, 1),
        device=device,
        warmup=count("--warmup", args.warmup, CPU_WARMUP if cpu else WARMUP, 0),
        rep=count("--rep", args.rep, CPU_REP if cpu else REP, 1),
        dense=not args.no_dense,
    )


def _config(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3:
        raise ValueError(f"--configs: expected three numbers S_Q,S_KV,TOPK, got {text!r}")
    s_q, s_kv, topk = (whole("--configs", part, 1) for part in parts)
    return s_q, s_kv, topk
