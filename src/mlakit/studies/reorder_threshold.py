"""The study `reorder-threshold`: up to how many new tokens is the decode pipeline faster than the prefill pipeline?

Both pipelines start from the plain query and the paged latent cache, and their projections count. Every power of four
is measured, and then wherever the faster pipeline changes, half-way between, until the change is known well enough.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from mlakit.bench.files import output_file
from mlakit.studies import row_flags
from mlakit.studies.command import run_study

if TYPE_CHECKING:
    from mlakit.bench.crossover import Point
    from mlakit.studies.bench_rows import Rows

BATCH_SIZES = tuple(2**i for i in range(9))  # 1 to 256
CPU_BATCH_SIZES = (1, 4)
KV_LEN, CPU_KV_LEN = 1024, 256
RESOLUTION = 0.1
NAME = "reorder-threshold"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's flags to a parser."""
    sizes = " ".join(map(str, BATCH_SIZES))
    parser.add_argument(
        "--batch-sizes", nargs="+", type=row_flags.positive, metavar="B", help=f"requests (default: {sizes})"
    )
    parser.add_argument(
        "--kv-len",
        type=row_flags.positive,
        metavar="S",
        help=f"keys of each request (default: {KV_LEN}; on a CPU {CPU_KV_LEN})",
    )
    parser.add_argument(
        "--max-q-len", type=row_flags.positive, metavar="Q", help="most new tokens a request (default: --kv-len)"
    )
    parser.add_argument(
        "--q-lens",
        nargs="+",
        type=row_flags.positive,
        metavar="Q",
        help="measure these and no others, instead of searching",
    )
    parser.add_argument(
        "--resolution",
        type=float,
        default=RESOLUTION,
        metavar="R",
        help="search until the q_len on both sides of a change differ by at most this part (default: %(default)s)",
    )
    parser.add_argument(
        "--scope",
        choices=["pipeline", "attention"],
        default="pipeline",
        help="with the projections of each pipeline (default), or attention alone",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a plot as PNG (default: beside the record)")
    row_flags.add_arguments(parser, backends="mlakit; on a CPU sdpa")


def search(at: Callable[[int], Point], longest: int, resolution: float) -> list[Point]:
    """Points of a curve by q_len: the powers of four up to `longest`, and whatever narrows a change of verdict to
    neighbours that differ by at most one, or by `resolution` of the smaller.

    A curve on which the verdict changes to and fro gets all powers of two, as there may be more to find.
    """
    from mlakit.bench.crossover import changes

    points: dict[int, Point] = {}

    def narrow(grid: Iterable[int]) -> list[Point]:
        for q_len in grid:
            if q_len not in points:
                points[q_len] = at(q_len)
        while (between := _between(points, resolution)) is not None:
            points[between] = at(between)
        return [point for _, point in sorted(points.items())]

    found = narrow(_powers(4, longest))
    return found if changes(found)[1] else narrow(_powers(2, longest))


def _powers(base: int, longest: int) -> list[int]:
    found = [1]
    while found[-1] * base < longest:
        found.append(found[-1] * base)
    return [*found, longest] if longest > 1 else found


def _between(points: dict[int, Point], resolution: float) -> int | None:
    """A q_len between two neighbours of different verdicts that are still too far apart."""
    known = [point for _, point in sorted(points.items()) if point.verdict is not None]
    for low, high in pairwise(known):
        apart = high.q_len - low.q_len
        if low.verdict != high.verdict and apart > max(1.0, resolution * low.q_len):
            middle = min(max(round(sqrt(low.q_len * high.q_len)), low.q_len + 1), high.q_len - 1)
            if middle not in points:  # where neither pipeline ran, the change is known no better
                return middle
    return None


def measure(rows: Rows, backend: str, size: int, kv_len: int, args: argparse.Namespace) -> None:
    """All points of one curve, into the record."""
    from mlakit.bench.batch_spec import BatchRequest, to_batch_spec
    from mlakit.bench.crossover import Point

    def at(q_len: int) -> Point:
        """The pipelines of one q_len, one after the other, so that the GPU's state is the same for both."""
        spec = to_batch_spec([BatchRequest(q_len, kv_len)] * size)
        decode, prefill = (
            rows.measure(backend, spec, pipeline=pipeline, scope=args.scope, label=f"{backend}_{pipeline}")
            for pipeline in ("decode", "prefill")
        )
        return Point(q_len, decode, prefill)

    longest = min(args.max_q_len or kv_len, kv_len)
    if args.q_lens:
        for q_len in sorted(set(args.q_lens)):
            at(q_len)
    else:
        search(at, longest, args.resolution)


def check(args: argparse.Namespace) -> None:
    """The study's own flags.

    Raises:
        ValueError: one makes no sense.
    """
    from mlakit.backends import registry
    from mlakit.dims import MLADims, preset

    if args.model is not None and not isinstance(preset(args.model), MLADims):
        raise ValueError(f"reorder-threshold compares MLA's two pipelines, and {args.model} has standard attention")
    if not 0 <= args.resolution <= 10:
        raise ValueError(f"--resolution: expected a number from 0 to 10, got {args.resolution}")
    if args.q_lens and args.kv_len and max(args.q_lens) > args.kv_len:
        raise ValueError(f"--q-lens: expected at most --kv-len {args.kv_len}, got {max(args.q_lens)}")
    for backend in args.backends or []:
        if "mla" not in registry.attention_kinds(backend):
            raise ValueError(f"--backends: {backend} computes no MLA, whose two pipelines are compared here")


def run(args: argparse.Namespace) -> int:
    """Run the study; returns the exit code: 0, or 1 if nothing could be compared.

    Raises:
        ValueError: bad input.
    """
    from mlakit.backends import registry
    from mlakit.bench.crossover import find_curves, recommend_thresholds
    from mlakit.bench.table import make_console
    from mlakit.studies.bench_rows import open_rows, print_findings
    from mlakit.studies.reorder_threshold_report import findings, print_curves

    check(args)
    plot_path = output_file(args.plot, "--plot")
    description = "At what query length does the prefill pipeline become faster than the decode pipeline?"
    with open_rows(args, NAME, description, mode="decode_vs_prefill") as rows:
        cpu = rows.device.name == "cpu"
        kv_len = args.kv_len or (CPU_KV_LEN if cpu else KV_LEN)
        if args.q_lens and max(args.q_lens) > kv_len:
            raise ValueError(f"--q-lens: expected at most {kv_len} (--kv-len), got {max(args.q_lens)}")
        sizes = sorted(set(args.batch_sizes or (CPU_BATCH_SIZES if cpu else BATCH_SIZES)))
        reasons: dict[str, str] = {}
        for backend in map(registry.normalize, args.backends or (["sdpa"] if cpu else ["mlakit"])):
            for size in sizes:
                measure(rows, backend, size, kv_len, args)
                if (last := rows.record.rows[-1]).status == "unavailable":
                    reasons[backend] = last.error or ""
                    break
        curves = find_curves(rows.record.rows)
        recommended = recommend_thresholds(curves)
        lines = findings(curves, recommended, args.scope)
        rows.finish(lines)
    out = make_console()
    print_curves(out, curves, f"decode against prefill pipeline: {rows.title}, {kv_len} keys, scope {args.scope}")
    print_findings(out, lines, reasons)
    if not curves:
        print("mlakit: no row succeeded", file=sys.stderr)
        return 1
    from mlakit.studies.reorder_threshold_plot import plot

    plot_path = plot_path or rows.path.with_name(f"{rows.path.stem}.png")
    plot(curves, {r.backend: r.threshold for r in recommended}, rows.title, plot_path)
    if not args.quiet:
        print(f"saved: plot {plot_path}", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study with command-line arguments; returns the exit code (2 for bad input, with one line on stderr)."""
    return run_study(NAME, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
