"""The study `num-splits`: how many pieces should a request's keys be cut into, and what does `auto` cost?

For every backend that declares the parameter. Powers of two are measured until two in a row are much slower than the
best; then the best and `auto` are measured again on other data, so that a lucky row is not taken for a good setting.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlakit.bench.files import output_file
from mlakit.studies import row_flags
from mlakit.studies.command import run_study

if TYPE_CHECKING:
    from mlakit.bench.results import BenchmarkResult
    from mlakit.studies.bench_rows import Rows
    from mlakit.studies.num_splits_report import Choice

NAME = "num-splits"
PARAMETERS = ("num_kv_splits", "num_splits")  # what backends call it
BATCH_SPECS = ("q1s8k", "q1s64k", "8q1s2k", "16q1s1k", "16q1s8k", "64q1s1k", "64q1s4k", "128q1s8k")
CPU_BATCH_SPECS = ("q1s1k", "4q1s256")
_MUCH_SLOWER = 1.2
_LEAST_KEYS = 64  # a piece smaller than a page of DeepSeek's caches is no use to anybody


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's flags to a parser."""
    parser.add_argument("--batch-specs", nargs="+", metavar="SPEC", help=f"batches (default: {' '.join(BATCH_SPECS)})")
    parser.add_argument(
        "--values",
        nargs="+",
        type=row_flags.positive,
        metavar="N",
        help="numbers of pieces beside auto (default: powers of two)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a plot as PNG (default: beside the record)")
    row_flags.add_arguments(parser, backends="all that declare num_kv_splits or num_splits")


def splits_parameter(backend: str) -> str | None:
    """What a backend calls the number of pieces; None if it declares no such parameter."""
    from mlakit.backends import registry

    declared = registry.load(backend).parameters if registry.has_adapter(backend) else {}
    return next((name for name in PARAMETERS if name in declared), None)


def values_for(backend: str, spec: str, asked: Sequence[int] | None) -> list[int]:
    """Numbers of pieces to measure: as asked, as far as the backend takes them, else powers of two that leave each
    piece a page of keys.
    """
    from mlakit.backends import registry
    from mlakit.bench.batch_spec import parse_batch_spec

    name = splits_parameter(backend)
    assert name is not None
    parameter = registry.load(backend).parameters[name]
    if asked:
        low, high = parameter.minimum or 0, parameter.maximum
        return [n for n in sorted(set(asked)) if n >= low and (high is None or n <= high)]
    longest = max(request.kv_len for request in parse_batch_spec(spec))
    return [int(n) for n in parameter.candidates(max(1, longest // _LEAST_KEYS))]


def measure_until_worse(
    measure: Callable[[int], BenchmarkResult], values: Iterable[int], best: float | None
) -> list[BenchmarkResult]:
    """Rows of ascending values, up to two in a row that are much slower than the best so far; `best` is a time to beat
    from the start.
    """
    rows, worse = [], 0
    for value in values:
        row = measure(value)
        rows.append(row)
        if row.timing is None:
            continue
        best = row.timing.median if best is None else min(best, row.timing.median)
        worse = worse + 1 if row.timing.median > _MUCH_SLOWER * best else 0
        if worse == 2:
            break
    return rows


def study_batch(rows: Rows, backend: str, spec: str, asked: Sequence[int] | None) -> Choice:
    """All rows of one backend on one batch, and what follows from them."""
    from mlakit.studies.num_splits_report import Choice

    name = splits_parameter(backend)
    assert name is not None

    def measure(value: int | str, seed: int = 0) -> BenchmarkResult:
        label = f"{backend} {name}={value}"
        return rows.measure(backend, spec, parameters={name: value}, seed=seed, label=label)

    auto = measure("auto")
    given: dict[int, BenchmarkResult] = {}
    if auto.status not in ("unavailable", "unsupported"):
        values = values_for(backend, spec, asked)
        # A number far too small for a long context is slow in a way that says nothing of larger ones.
        found = measure_until_worse(measure, values, None)
        given = dict(zip(values, found, strict=False))
    choice = Choice(backend, name, spec, auto, given)
    if choice.best is not None and not choice.is_tie:
        choice.confirmation = (measure("auto", seed=1), measure(choice.best, seed=1))
    return choice


def check(args: argparse.Namespace) -> list[str]:
    """The backends to measure, from the study's own flags.

    Raises:
        ValueError: one of them makes no sense.
    """
    from mlakit.backends import registry
    from mlakit.bench.batch_spec import parse_batch_spec
    from mlakit.bench.config import infer_attention

    for spec in args.batch_specs or ():
        parse_batch_spec(spec)
    if args.backends:
        for backend in args.backends:
            if splits_parameter(registry.check_name(backend)) is None:
                have = ", ".join(name for name in registry.names() if splits_parameter(name))
                raise ValueError(f"--backends: {backend} declares no {' or '.join(PARAMETERS)}; these do: {have}")
        return list(dict.fromkeys(map(registry.normalize, args.backends)))
    attention = infer_attention(args.model, [])
    return [name for name in registry.names() if attention in registry.attention_kinds(name) and splits_parameter(name)]


def run(args: argparse.Namespace) -> int:
    """Run the study; returns the exit code: 0, or 1 if nothing could be compared.

    Raises:
        ValueError: bad input.
    """
    backends = check(args)
    plot_path = output_file(args.plot, "--plot")
    from mlakit.bench.table import make_console
    from mlakit.studies.bench_rows import open_rows, print_findings
    from mlakit.studies.num_splits_report import findings, print_choices

    description = "Into how many pieces should a request's keys be cut, and what does auto cost against the best?"
    choices, reasons = [], {}
    with open_rows(args, NAME, description) as rows:
        specs = args.batch_specs or (CPU_BATCH_SPECS if rows.device.name == "cpu" else BATCH_SPECS)
        for backend in backends:
            for spec in specs:
                choice = study_batch(rows, backend, spec, args.values)
                if choice.auto.status == "unavailable":
                    reasons[backend] = choice.auto.error or ""
                    break
                choices.append(choice)
        lines = findings(choices)
        rows.finish(lines)
    out = make_console()
    print_choices(out, choices, f"pieces that a request's keys are cut into: {rows.title}")
    print_findings(out, lines, reasons)
    if not any(choice.best is not None for choice in choices):
        print("mlakit: no row succeeded", file=sys.stderr)
        return 1
    from mlakit.studies.num_splits_plot import plot

    plot_path = plot_path or rows.path.with_name(f"{rows.path.stem}.png")
    plot([choice for choice in choices if choice.best is not None], rows.title, plot_path)
    if not args.quiet:
        print(f"saved: plot {plot_path}", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study with command-line arguments; returns the exit code (2 for bad input, with one line on stderr)."""
    return run_study(NAME, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
