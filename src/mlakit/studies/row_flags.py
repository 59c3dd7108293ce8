"""The flags that the studies of the bench's rows share. Nothing slow is imported: every `--help` reads this."""

import argparse
from pathlib import Path

MODEL = "deepseek-v3"
REPEATS = {"cpu": 5, "cuda": 40}


def add_arguments(parser: argparse.ArgumentParser, *, backends: str) -> None:
    """The flags they share; `backends` says which run if none are named."""
    parser.add_argument("--backends", nargs="+", metavar="BACKEND", help=f"which to measure (default: {backends})")
    parser.add_argument(
        "--model", metavar="PRESET", help=f"dimensions by name (default: {MODEL}; on a CPU a small one)"
    )
    parser.add_argument(
        "--tp", type=positive, default=1, metavar="N", help="tensor parallelism: a GPU has 1/N of the model's heads"
    )
    parser.add_argument("--num-q-heads", type=positive, metavar="N", help="query heads of the model, before --tp")
    parser.add_argument("--block-size", type=positive, default=64, metavar="N", help="tokens in a page (default: 64)")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="cuda:0, cpu or auto (default)")
    parser.add_argument(
        "--repeats", type=positive, metavar="N", help=f"samples of a row (default: {REPEATS['cuda']}; on a CPU 5)"
    )
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="patience for one row")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="save the record as JSON")
    parser.add_argument("--resume", action="store_true", help="go on with --output-json: only missing rows run")
    parser.add_argument("--quiet", action="store_true", help="no progress; results and errors only")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
