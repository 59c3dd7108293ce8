"""The study `parallel`: on several GPUs, should a decode batch be divided by heads, by keys, or both?

Runs under `torchrun`, and starts its ranks itself where nobody did. Every plan is checked against float64 first, and
its time split into attention, merge and communication beside the least that the link allows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mlakit.bench.files import keep_earlier, output_file, output_folder
from mlakit.studies.command import run_study
from mlakit.studies.flag_values import whole
from mlakit.studies.parallel_options import add_arguments as add_arguments
from mlakit.studies.parallel_options import parse


def run(args: argparse.Namespace) -> int:
    """Run the study; returns the exit code: 0, 1 if a result was wrong or nothing could be timed, 4 if a rank was lost.

    Raises:
        ValueError: bad input.
    """
    import torch

    from mlakit.distributed import launch
    from mlakit.studies.parallel_run import run_rank

    is_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if is_cuda and not torch.cuda.is_available():
        raise ValueError(f"--device: PyTorch {torch.__version__} sees no GPU here")
    inside = launch.under_torchrun()
    try:
        ranks = _ranks(args, is_cuda, torch.cuda.device_count() if is_cuda else 0, inside)
        options = parse(args, is_cuda=is_cuda, ranks=ranks)
    except ValueError:
        if inside and os.environ["RANK"] != "0":  # the first says it for all
            return 2
        raise
    # Folders are the first rank's, who writes.
    folder, record = args.output_dir or Path(), args.output_json or Path()
    if not inside or os.environ["RANK"] == "0":
        folder = output_folder(args.output_dir, "parallel", "--output-dir")
        record = output_file(args.output_json, "--output-json") or folder / "record.json"
        keep_earlier(record)
    if inside:
        return launch.run_rank(run_rank, options, folder, record)
    try:
        return launch.launch(run_rank, ranks, options, folder, record, timeout=options.timeout)
    except KeyboardInterrupt:
        kept = f"the rows that were done are in {record}" if record.exists() else "nothing is saved"
        print(f"interrupted; {kept}", file=sys.stderr)
        raise


def _ranks(args: argparse.Namespace, is_cuda: bool, gpus: int, inside: bool) -> int:
    if inside:
        size = int(os.environ["WORLD_SIZE"])
        if args.ranks is not None and whole("--ranks", args.ranks, 1) != size:
            raise ValueError(f"--ranks: torchrun has started {size} ranks, got {args.ranks}")
        return size
    ranks = (gpus if is_cuda else 2) if args.ranks is None else whole("--ranks", args.ranks, 1)
    if is_cuda and ranks > gpus:
        raise ValueError(f"--ranks: a rank needs a GPU of its own, PyTorch sees {gpus} here, got {ranks}")
    return ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study with command-line arguments; returns the exit code (2 for bad input, with one line on stderr)."""
    return run_study("parallel", __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
