"""The study `layers`: which implementation of the MLA layer is the fastest, and which takes least memory, where?

Every implementation gets the same weights and inputs, and is compared with a float64 run before it is timed. What is
printed as a finding or a recommendation is computed from what was measured (`layers_summary`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlakit.bench.files import output_file, output_folder
from mlakit.studies.checkpoint import add_run_arguments, go_on, read_earlier, resumable
from mlakit.studies.command import progress, run_study
from mlakit.studies.layer_options import (
    Options,
    add_common_arguments,
    add_implementations,
    parse_common,
    whole_numbers,
)
from mlakit.studies.layers_report import Row, csv_text, groups, header, table, title_of
from mlakit.studies.layers_summary import findings, markdown, recommendations

if TYPE_CHECKING:
    import torch

    from mlakit.studies.layer_steps import Layers, Step

SCHEMA = "mlakit.layers/1"
PHASES = ("prefill", "decode")
GPU_SIZES = ((1, 8, 32), (256, 1024, 4096))
CPU_SIZES = ((1, 4), (128, 256, 512))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's flags to a parser."""
    batches, lengths = (" ".join(map(str, sizes)) for sizes in GPU_SIZES)
    cpu_batches, cpu_lengths = (" ".join(map(str, sizes)) for sizes in CPU_SIZES)
    add_implementations(parser)
    parser.add_argument(
        "--batch-sizes", nargs="+", metavar="B", help=f"requests (default: {batches}; on a CPU {cpu_batches})"
    )
    parser.add_argument(
        "--seq-lengths",
        nargs="+",
        metavar="S",
        help=f"tokens of a prefill, keys of a decode step (default: {lengths}; on a CPU {cpu_lengths})",
    )
    parser.add_argument("--phase", choices=(*PHASES, "both"), default="both", help="default: %(default)s")
    parser.add_argument("--no-check", action="store_true", help="time results without comparing them with float64")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="made if need be (default: mlakit-runs/layers-DATE-TIME)"
    )
    parser.add_argument(
        "--output-json",
        type=Path,
        metavar="FILE",
        help="the record, with all that was measured (default: DIR/record.json)",
    )
    add_common_arguments(parser, many_shapes=True)
    add_run_arguments(parser)


@dataclass(frozen=True)
class Sizes:
    """What to measure of each shape."""

    batches: tuple[int, ...]
    seq_lens: tuple[int, ...]
    phases: tuple[str, ...]
    check: bool


def parse_sizes(args: argparse.Namespace, options: Options) -> Sizes:
    """Check the sizes, and fill in the defaults of the device.

    Raises:
        ValueError: a size makes no sense.
    """
    batches, lengths = GPU_SIZES if options.is_cuda else CPU_SIZES
    return Sizes(
        batches=tuple(whole_numbers("--batch-sizes", args.batch_sizes or batches)),
        seq_lens=tuple(whole_numbers("--seq-lengths", args.seq_lengths or lengths)),
        phases=PHASES if args.phase == "both" else (args.phase,),
        check=not args.no_check,
    )


def measure_size(
    layers: Layers, options: Options, sizes: Sizes, batch: int, seq_len: int, begin: Callable[[str], None]
) -> Iterator[Row]:
    """Every implementation and phase at one size; whatever cannot be done is a row with the reason."""
    import torch

    from mlakit.studies.layer_steps import free_memory, reason_of

    x = expected = None
    failed = ""
    picked = sorted({0, batch - 1})  # of all requests, those compared with float64
    try:
        with torch.no_grad():
            x = layers.inputs(batch, seq_len)
            expected = layers.reference(x[picked]) if sizes.check else None
    except Exception as error:
        failed = reason_of(error)
        if x is not None:
            failed += ", in the float64 run to compare with (--no-check does without)"
    for phase in sizes.phases:
        for implementation in options.implementations:
            begin(f"{batch} x {seq_len} {phase}: {implementation}")
            rows = [
                Row(layers.shape, implementation, phase, mode, batch, seq_len, options.dtype, failed)
                for mode in (("eager", "graph") if phase == "decode" and options.is_cuda else ("eager",))
            ]
            step: list[Step] = []
            for row in rows:
                if x is None or failed:
                    continue
                try:
                    with torch.no_grad():
                        _measure(row, layers, options, x, expected, picked, step)
                except Exception as error:  # whatever goes wrong costs a row, Triton's own kinds of errors included
                    row.median, row.reason = None, reason_of(error)
                free_memory()
            yield from rows


def _measure(
    row: Row,
    layers: Layers,
    options: Options,
    x: torch.Tensor,
    expected: torch.Tensor | None,
    picked: Sequence[int],
    kept: list[Step],
) -> None:
    """Fill in a row. The cache of an eager decode step serves the one under a graph too, by `kept`."""
    from mlakit.studies.layer_steps import Step, cache_bytes, measure_call, require_memory

    graph = row.mode == "graph"
    queries = row.seq_len if row.phase == "prefill" else 1
    require_memory(layers.shape, layers.device, row.batch, queries, row.seq_len)
    model = layers.model(row.implementation)
    step = Step(layers, model, x, row.phase, table=graph, cache=kept[0].cache if kept else None)
    kept.append(step)

    target = None if expected is None else expected[:, -queries:]
    if not _passes(row, step()[list(picked)], target, options, ""):
        return
    measured = measure_call(step, options, cuda_graph=graph)
    # The timed callable's own last output: a graph may replay something else, and state may wear out.
    if not _passes(row, step.last()[list(picked)], target, options, ", right before timing"):
        return
    timing = measured.timing
    row.median, row.mean, row.std, row.min, row.max = timing.median, timing.mean, timing.std, timing.min, timing.max
    row.ci95, row.samples, row.host = timing.ci95, len(timing.samples), None if graph else timing.host
    row.temporary_mib, row.allocated_mib = measured.temporary_mib, measured.allocated_mib
    row.cache_mib, row.weights_mib = cache_bytes(step.cache) / 2**20, layers.weight_bytes / 2**20


def _passes(row: Row, out: torch.Tensor, target: torch.Tensor | None, options: Options, when: str) -> bool:
    from mlakit.studies.layer_difference import difference

    if target is None:
        return True
    found = difference(out, target)
    for name, value in asdict(found).items():
        setattr(row, name, value)
    row.wrong = not found.agrees(options.tolerance)
    if row.wrong:
        row.reason = f"wrong result{when}: off by {found.relative:.3g}, its worst token by {found.worst_token:.3g}"
    return not row.wrong


def run(args: argparse.Namespace) -> int:
    """Run the study; returns the exit code: 0, or 1 if a result was wrong or nothing could be timed.

    Raises:
        ValueError: bad input.
    """
    options = parse_common(args)
    sizes = parse_sizes(args, options)
    from mlakit.hardware import device_info
    from mlakit.studies.cpu_threads import steady_threads
    from mlakit.studies.layer_steps import Layers, free_memory, stamp

    most = sizes.batches[-1], sizes.seq_lens[-1]
    for shape in options.shapes:
        Layers(shape, options, *most).require_possible()
    if args.resume and not args.output_dir:
        raise ValueError("--resume needs --output-dir: the folder of the record to go on with")
    folder = output_folder(args.output_dir, "layers", "--output-dir")
    record_path = output_file(args.output_json, "--output-json") or folder / "record.json"
    kept = read_earlier(record_path, SCHEMA, resume=args.resume, flag="--output-dir")
    info = device_info(options.device)
    notes = _notes(options, sizes, given=bool(args.model or args.batch_sizes or args.seq_lengths))
    print(f"{info.name}: {'; '.join(shape.title for shape in options.shapes)}")
    print("\n".join(notes), end="\n\n", flush=True)
    with nullcontext() if options.is_cuda else steady_threads() as threads:
        record: dict[str, Any] = {
            "schema": SCHEMA,
            **stamp(options),
            "options": {**asdict(options), "shapes": [shape.fields() for shape in options.shapes], **asdict(sizes)},
            "cpu_threads": threads,
            "complete": False,
            "rows": [],
        }
        earlier = go_on(kept, record_path, record)
        rows = [Row.from_json(row, options.shapes) for row in earlier["rows"]]
        done = {(row.shape, row.batch, row.seq_len) for row in rows}
        jobs = len(options.shapes) * len(sizes.batches) * len(sizes.seq_lens) * len(sizes.phases)
        print(header())
        jobs -= len(done) * len(sizes.phases)
        where = () if args.output_dir else ("--output-dir", str(folder))
        with resumable(record_path, where), progress(jobs * len(options.implementations), quiet=args.quiet) as begin:
            for shape in options.shapes:
                layers = Layers(shape, options, *most)
                for batch in sizes.batches:
                    for seq_len in sizes.seq_lens:
                        if (shape, batch, seq_len) in done:
                            continue
                        mine = list(measure_size(layers, options, sizes, batch, seq_len, begin))
                        rows += mine
                        for job in groups(mine):
                            print("\n".join(table(job)), flush=True)
                        save(record_path, folder, record, rows)
                del layers
                free_memory()
    record["complete"] = True
    saved = [*save(record_path, folder, record, rows), *_plots(folder, rows, info.name)]
    report = folder / "summary.md"
    report.write_text(markdown(rows, info.name, record, notes))
    for title, lines in (("Findings", findings(rows)), ("Recommendations", recommendations(rows))):
        print(f"\n{title}:")
        print("\n".join(f"  - {line}" for line in lines) or "  none")
    names = (path.name if path.parent == folder else str(path) for path in [*saved, report])
    if not args.quiet:
        print(f"saved in {folder}: {', '.join(names)}", file=sys.stderr)
    return 1 if any(row.wrong for row in rows) or not any(row.median for row in rows) else 0


def _notes(options: Options, sizes: Sizes, *, given: bool) -> list[str]:
    notes = []
    if not options.is_cuda:
        if not given:
            batches, lengths = GPU_SIZES
            notes.append(
                f"On a CPU the defaults are small, for under a minute: {options.model!r} instead of a model's "
                f"dimensions, batches of {sizes.batches[-1]} instead of {batches[-1]}, {sizes.seq_lens[-1]} tokens "
                f"instead of {lengths[-1]}."
            )
        notes.append("On a CPU every implementation runs in PyTorch: its times say nothing of a GPU's.")
    notes.append(
        f"Weights in {options.dtype}, time: median with a cold cache; "
        + ("speed-up and tokens/s count the host's time where that is longer; " if options.is_cuda else "")
        + (
            f"error: relative, from float64 (at most {options.tolerance:g})."
            if sizes.check
            else "results were not checked (--no-check)."
        )
    )
    return notes


def save(record_path: Path, folder: Path, record: dict[str, Any], rows: Sequence[Row]) -> list[Path]:
    """Write the record and the details as they are so far, each in one step."""
    from mlakit.bench.files import write_atomically

    record["rows"] = [row.as_json() for row in rows]
    paths = [record_path, folder / "details.csv"]
    write_atomically(paths[0], json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_atomically(paths[1], csv_text(rows))
    return paths


def _plots(folder: Path, rows: Sequence[Row], device: str) -> list[Path]:
    from mlakit.studies.layer_plot import Panel, plot_panels

    written = []
    shapes = groups(rows, lambda row: row.shape)
    values: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("latency", "ms", lambda row: row.seconds and row.seconds * 1e3),
        ("throughput", "tokens/s", lambda row: row.tokens_per_s),
        ("memory", "MiB of cache and temporaries", lambda row: row.memory_mib),
    )
    for mine in shapes:
        phases = groups(mine, lambda row: (row.phase, row.mode))
        for name, unit, value in values:
            path = folder / (f"{name}.png" if len(shapes) == 1 else f"{name}_{mine[0].shape.slug}.png")
            title = f"MLA layer on {device}: {name}\n{mine[0].shape.title}, {mine[0].dtype}"
            panels = [
                [
                    Panel(f"{title_of(rows[0].phase, rows[0].mode)}, batch {rows[0].batch}", rows, value, unit)
                    for rows in groups(phase, lambda row: row.batch)
                ]
                for phase in phases
            ]
            if plot_panels(panels, title, path):
                written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study with command-line arguments; returns the exit code (2 for bad input, with one line on stderr)."""
    return run_study("layers", __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
