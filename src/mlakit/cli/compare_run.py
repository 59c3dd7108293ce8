"""What `mlakit compare` does once its flags are read."""

import argparse
import sys
from pathlib import Path

from mlakit.bench.table import make_console
from mlakit.cli import exit_codes
from mlakit.report.compare import Comparison, compare_records
from mlakit.report.compare_show import print_comparison, regression_lines, save
from mlakit.report.load import load_records


def execute(args: argparse.Namespace) -> int:
    """Do it; returns the exit code.

    Raises:
        ValueError: bad input of any kind.
    """
    limit = None if args.fail_above is None else parse_percent("--fail-above", args.fail_above)
    margin = parse_percent("--same-within", args.same_within)
    for flag, path in (("--output-json", args.output_json), ("--output-csv", args.output_csv)):
        _require_file(flag, path)
    if len(args.records) != 2:
        raise ValueError(f"expected two records, A and B, got {len(args.records)} (or --worktree REV)")
    comparison = compare_records(*load_records(args.records), margin=margin)
    return show(comparison, args, limit)


def show(comparison: Comparison, args: argparse.Namespace, limit: float | None) -> int:
    """Print and save a comparison; returns the exit code."""
    print_comparison(make_console(), comparison)
    save(comparison, args.output_json, args.output_csv)
    for line in comparison.warnings:
        print(f"warning: {line}", file=sys.stderr)
    if not args.quiet:
        for line in comparison.notes:
            print(f"note: {line}", file=sys.stderr)
        saved = [str(path) for path in (args.output_json, args.output_csv) if path]
        if saved:
            print(f"saved: {', '.join(saved)}", file=sys.stderr)
    found = [] if limit is None else list(regression_lines(comparison, limit))
    for line in found:
        print(f"mlakit: regression: {line}", file=sys.stderr)
    return exit_codes.FAILED if found else exit_codes.DONE


def parse_percent(flag: str, text: str) -> float:
    """A percentage as a fraction: "5%" is 0.05.

    Raises:
        ValueError: it is none.
    """
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not text.endswith("%") or not 0 <= value < float("inf"):
        raise ValueError(f"{flag}: expected a percentage such as 5%, got {text!r}")
    return value


def _require_file(flag: str, path: Path | None) -> None:
    if path is not None and path.is_dir():
        raise ValueError(f"{flag}: {str(path)!r} is a folder; expected a file to write to")
