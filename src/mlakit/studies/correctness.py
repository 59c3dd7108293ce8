"""The study `correctness`: do the implementations of the MLA layer agree, with each other and with float64?

All get the same weights and inputs, for a prefill and a few decode steps after it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlakit.bench.files import output_file, output_folder
from mlakit.studies.checkpoint import add_run_arguments, go_on, read_earlier, resumable
from mlakit.studies.command import progress, run_study
from mlakit.studies.correctness_report import FLOAT64, Pair, Run, pairs_csv, runs_csv, size_table, verdict
from mlakit.studies.layer_options import (
    Options,
    add_common_arguments,
    add_implementations,
    parse_common,
    whole,
    whole_numbers,
)

if TYPE_CHECKING:
    import torch

    from mlakit.studies.layer_steps import Layers

SCHEMA = "mlakit.correctness/1"
# Shortest, longest, step; batches.
GPU_SIZES = (256, 1024, 256, (1, 4))
CPU_SIZES = (64, 256, 64, (1, 2))
DECODE_STEPS = 4
_MOST_SIZES = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's flags to a parser."""
    for flag, what, index in (
        ("--min-seq-len", "shortest prefill", 0),
        ("--max-seq-len", "longest prefill", 1),
        ("--seq-len-step", "from one length to the next", 2),
    ):
        parser.add_argument(
            flag, metavar="N", help=f"{what} (default: {GPU_SIZES[index]}; on a CPU {CPU_SIZES[index]})"
        )
    batches, cpu_batches = (" ".join(map(str, sizes[3])) for sizes in (GPU_SIZES, CPU_SIZES))
    parser.add_argument(
        "--batch-sizes", nargs="+", metavar="B", help=f"requests (default: {batches}; on a CPU {cpu_batches})"
    )
    parser.add_argument(
        "--decode-steps", metavar="N", default=str(DECODE_STEPS), help="after each prefill (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PREFIX",
        help="writes PREFIX.png and PREFIX.csv (latency and memory), PREFIX_pairs.csv (differences) and PREFIX.json "
        "(default: mlakit-runs/correctness-DATE-TIME/correctness)",
    )
    parser.add_argument(
        "--output-json", type=Path, metavar="FILE", help="the record, with all that was measured (default: PREFIX.json)"
    )
    add_implementations(parser)
    add_common_arguments(parser)
    add_run_arguments(parser)


@dataclass(frozen=True)
class Sizes:
    """What to compare."""

    seq_lens: tuple[int, ...]
    batches: tuple[int, ...]
    decode_steps: int


def parse_sizes(args: argparse.Namespace, options: Options) -> Sizes:
    """Check the sizes, and fill in the defaults of the device.

    Raises:
        ValueError: a size makes no sense, or there is none.
    """
    shortest, longest, step, batches = GPU_SIZES if options.is_cuda else CPU_SIZES
    low = whole("--min-seq-len", args.min_seq_len or shortest, 1)
    high = whole("--max-seq-len", args.max_seq_len or max(longest, low), 1)
    by = whole("--seq-len-step", args.seq_len_step or step, 1)
    if high < low:
        raise ValueError(f"--max-seq-len: expected at least --min-seq-len, {low}, got {high}")
    if (high - low) // by >= _MOST_SIZES:
        raise ValueError(f"--seq-len-step: expected at most {_MOST_SIZES} lengths, got {(high - low) // by + 1}")
    return Sizes(
        seq_lens=tuple(range(low, high + 1, by)),
        batches=tuple(whole_numbers("--batch-sizes", args.batch_sizes or batches)),
        decode_steps=whole("--decode-steps", args.decode_steps, 0),
    )


def compare_size(
    layers: Layers, options: Options, batch: int, seq_len: int, decode_steps: int, begin: Callable[[str], None]
) -> tuple[list[Run], list[Pair]]:
    """Run, compare and time every implementation at one size; whatever cannot be done is a run with the reason."""
    import torch

    from mlakit.studies.layer_difference import difference
    from mlakit.studies.layer_steps import free_memory, reason_of

    runs = [Run(name, batch, seq_len, options.dtype) for name in options.implementations]
    outputs: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        try:
            x = layers.inputs(batch, seq_len + decode_steps)
        except Exception as error:
            for run in runs:
                run.reason = reason_of(error)
            return runs, []
        for run in runs:
            begin(f"{batch} x {seq_len}: {run.implementation}")
            try:
                outputs[run.implementation] = _run(run, layers, options, x)
            except Exception as error:  # whatever goes wrong costs a row, Triton's own kinds of errors included
                run.reason = reason_of(error)
            free_memory()
        begin(f"{batch} x {seq_len}: float64")
        named = list(combinations(outputs, 2))
        try:
            outputs[FLOAT64] = layers.reference(x)
            named = [(name, FLOAT64) for name in outputs if name != FLOAT64] + named
        except Exception as error:
            runs.append(Run(FLOAT64, batch, seq_len, FLOAT64, reason_of(error)))
        phases = [("prefill", slice(0, seq_len))]
        if decode_steps:
            phases.append(("decode", slice(seq_len, None)))
        pairs = [
            Pair(
                one, other, phase, batch, seq_len,
                difference(outputs[one][:, part], outputs[other][:, part]), options.tolerance,
            )
            for one, other in named
            for phase, part in phases
        ]  # fmt: skip
    return runs, pairs


def _run(run: Run, layers: Layers, options: Options, x: torch.Tensor) -> torch.Tensor:
    """The outputs of a prefill and of the decode steps after it, [batch, seq_len + steps, dim]; fills in the times."""
    import torch

    from mlakit.studies.layer_steps import Step, cache_bytes, measure_call, require_memory

    require_memory(layers.shape, layers.device, run.batch, run.seq_len, run.seq_len)
    model, freqs = layers.model(run.implementation), layers.freqs()
    cache = model.make_cache(run.batch, x.shape[1])
    parts = [model(x[:, : run.seq_len], 0, freqs[: run.seq_len], "causal", cache)]
    for position in range(run.seq_len, x.shape[1]):
        new = x[:, position : position + 1].contiguous()
        parts.append(model(new, position, freqs[position : position + 1], None, cache))
    out = torch.cat(parts, dim=1)
    del parts
    decode = measure_call(Step(layers, model, x, "decode", cache=cache), options)
    prefill = measure_call(Step(layers, model, x[:, : run.seq_len], "prefill", cache=cache), options)
    run.prefill_ms, run.decode_ms = prefill.timing.median * 1e3, decode.timing.median * 1e3
    run.prefill_temporary_mib, run.decode_temporary_mib = prefill.temporary_mib, decode.temporary_mib
    run.cache_mib = cache_bytes(cache) / 2**20
    return out


def run(args: argparse.Namespace) -> int:
    """Run the study; returns the exit code: 0, or 1 if a pair disagreed or nothing could be compared.

    Raises:
        ValueError: bad input.
    """
    options = parse_common(args)
    sizes = parse_sizes(args, options)
    from mlakit.hardware import device_info
    from mlakit.studies.cpu_threads import steady_threads
    from mlakit.studies.layer_steps import Layers, stamp

    if args.output is not None and (not args.output.name or args.output.is_dir()):
        raise ValueError(f"--output: expected a prefix of file names, got the folder {str(args.output)!r}")
    info, (shape,) = device_info(options.device), options.shapes
    layers = Layers(shape, options, sizes.batches[-1], sizes.seq_lens[-1] + sizes.decode_steps)
    layers.require_possible()
    if args.resume and not (args.output or args.output_json):
        raise ValueError("--resume needs --output: the prefix of the record to go on with")
    folder = output_folder(args.output.parent if args.output else None, "correctness", "--output")
    prefix = folder / (args.output.name if args.output else "correctness")
    record_path = output_file(args.output_json, "--output-json") or prefix.with_name(prefix.name + ".json")
    kept = read_earlier(record_path, SCHEMA, resume=args.resume, flag="--output")
    print(f"{info.name}: {shape.title}, weights in {options.dtype}, tolerance {options.tolerance:g}")
    if not options.is_cuda:
        if args.model is args.min_seq_len is args.max_seq_len is args.batch_sizes is None:
            print(
                f"On a CPU the defaults are small, for under a minute: {options.model!r}, {sizes.seq_lens[0]} to "
                f"{sizes.seq_lens[-1]} tokens instead of {GPU_SIZES[0]} to {GPU_SIZES[1]}."
            )
        print("On a CPU every implementation runs in PyTorch: mlakit's kernels are not compared here.")
    print(flush=True)
    with nullcontext() if options.is_cuda else steady_threads() as threads:
        record: dict[str, Any] = {
            "schema": SCHEMA,
            **stamp(options),
            "options": {**asdict(options), "shapes": [shape.fields()], **asdict(sizes)},
            "cpu_threads": threads,
            "complete": False,
        }
        earlier = go_on(kept, record_path, record)
        runs = [Run(**row) for row in earlier["rows"]]
        pairs = [_pair(found, options.tolerance) for found in earlier.get("pairs", ())]
        done = {(run.batch, run.seq_len) for run in runs}
        total = (len(sizes.batches) * len(sizes.seq_lens) - len(done)) * (len(options.implementations) + 1)
        where = () if args.output else ("--output", str(prefix))
        with resumable(record_path, where), progress(total, quiet=args.quiet) as begin:
            for batch in sizes.batches:
                for seq_len in sizes.seq_lens:
                    if (batch, seq_len) in done:
                        continue
                    mine, found = compare_size(layers, options, batch, seq_len, sizes.decode_steps, begin)
                    print("\n".join(size_table(mine, found, sizes.decode_steps)), end="\n\n", flush=True)
                    runs += mine
                    pairs += found
                    save(record_path, prefix, record, runs, pairs)
    record["complete"] = True
    saved = save(record_path, prefix, record, runs, pairs)
    picture = prefix.with_name(prefix.name + ".png")
    if _plot(runs, f"{info.name}\n{shape.title}, {options.dtype}", picture):
        saved.append(picture)
    print("\n".join(verdict(pairs, options.tolerance)))
    if not args.quiet:
        print(f"saved: {', '.join(map(str, saved))}", file=sys.stderr)
    return 0 if pairs and all(pair.agrees for pair in pairs) else 1


def _pair(found: Mapping[str, Any], tolerance: float) -> Pair:
    """What `Pair.as_json` made of a pair."""
    from mlakit.studies.layer_difference import Difference

    names = ("first", "second", "phase", "batch", "seq_len")
    # JSON has no infinity: it is what is missing.
    far = {field.name: math.inf if found[field.name] is None else found[field.name] for field in fields(Difference)}
    return Pair(**{name: found[name] for name in names}, difference=Difference(**far), tolerance=tolerance)


def save(
    record_path: Path, prefix: Path, record: dict[str, Any], runs: Sequence[Run], pairs: Sequence[Pair]
) -> list[Path]:
    """Write the record and both tables as they are so far, each in one step."""
    from mlakit.bench.files import write_atomically

    record |= {"rows": [asdict(run) for run in runs], "pairs": [pair.as_json() for pair in pairs]}
    contents = {
        record_path: json.dumps(record, indent=1, allow_nan=False) + "\n",
        prefix.with_name(prefix.name + ".csv"): runs_csv(runs, pairs),
        prefix.with_name(prefix.name + "_pairs.csv"): pairs_csv(pairs),
    }
    for path, text in contents.items():
        write_atomically(path, text)
    return list(contents)


def _plot(runs: Sequence[Run], title: str, path: Path) -> bool:
    from mlakit.studies.layer_plot import Panel, plot_panels

    batches = dict.fromkeys(run.batch for run in runs)
    values: tuple[tuple[str, str, Callable[[Run], float | None]], ...] = (
        ("prefill", "ms", lambda run: run.prefill_ms),
        ("decode step", "ms", lambda run: run.decode_ms),
        ("prefill", "MiB of cache and temporaries", lambda run: run.memory_mib),
    )
    panels = [
        [Panel(f"{name}, batch {batch}", [r for r in runs if r.batch == batch], value, unit) for batch in batches]
        for name, unit, value in values
    ]
    return plot_panels(panels, f"MLA layer on {title}", path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study with command-line arguments; returns the exit code (2 for bad input, with one line on stderr)."""
    return run_study("correctness", __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
