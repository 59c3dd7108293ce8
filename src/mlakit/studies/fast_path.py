"""The study `fast-path`: what does the layer's short path gain for sequences of at most 256 tokens, in time and memory?

Original is the standard path (`fast_path_tokens=0`), optimized the layer as it comes; both are compared with a float64
run before they are timed. What is printed as a conclusion is computed from what was measured (`fast_path_report`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlakit.bench.files import output_file
from mlakit.studies.checkpoint import add_run_arguments, go_on, read_earlier, resumable
from mlakit.studies.command import progress, run_study
from mlakit.studies.fast_path_report import Row, Variant, cells, conclusion, csv_text, table
from mlakit.studies.flag_values import whole, whole_numbers
from mlakit.studies.layer_options import Options, add_common_arguments, parse_common

if TYPE_CHECKING:
    import torch

    from mlakit.studies.layer_steps import Layers

SCHEMA = "mlakit.fast_path/1"
SEQ_LENGTHS = (64, 128, 256, 512)
BATCH_SIZE = 32
CPU_BATCH_SIZE = 4
# Few rows, whose differences matter: other processes on the machine blur those of a handful of calls.
CPU_TRIALS = 20
OURS = "ours"
_NAIVE = {"cache_dtype": "bf16"}  # naive keeps no latent, whatever fused's cache is to be


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's flags to a parser."""
    lengths = " ".join(map(str, SEQ_LENGTHS))
    parser.add_argument("--seq-lengths", nargs="+", metavar="S", help=f"tokens (default: {lengths})")
    parser.add_argument(
        "--batch-size", metavar="B", help=f"requests (default: {BATCH_SIZE}; on a CPU {CPU_BATCH_SIZE})"
    )
    parser.add_argument(
        "--mask", choices=("causal", "none"), default="causal", help="which keys a token sees (default: %(default)s)"
    )
    parser.add_argument(
        "--baseline",
        default=OURS,
        metavar="ours|MODULE:NAME",
        help="the original: ours is naive with the short path off; else what makes a layer from mlakit.nn.Args, with "
        "DeepSeek's parameter names and forward (default: %(default)s)",
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="save everything measured as JSON")
    parser.add_argument("--output-csv", type=Path, metavar="FILE", help="save the table as CSV")
    add_common_arguments(parser)
    add_run_arguments(parser)


def parse_baseline(text: str) -> Callable[[Any], torch.nn.Module] | None:
    """What `--baseline` names; None for ours.

    Raises:
        ValueError: no such module, or nothing callable of that name in it.
    """
    if text == OURS:
        return None
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise ValueError(f"--baseline: expected {OURS} or MODULE:NAME, got {text!r}")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--baseline: cannot import {text!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"--baseline: {text!r} is no function or class")
    return found


def measure_length(
    layers: Layers,
    options: Options,
    batch: int,
    seq_len: int,
    mask: str | None,
    models: Mapping[str, Callable[[], Any]],
) -> Row:
    """Check and time each variant at one length; what cannot be done has a reason instead of a time."""
    import torch

    from mlakit.studies.layer_steps import free_memory, reason_of

    row = Row(seq_len, batch, layers.args("naive", **_NAIVE).fast_path_tokens)
    picked = sorted({0, batch - 1})
    with torch.no_grad():
        try:
            x = layers.inputs(batch, seq_len)
            expected = layers.reference(x[picked], causal=mask is not None)
        except Exception as error:
            reason = f"{reason_of(error)}, in the float64 run to compare with"
            row.variants = {name: Variant(reason=reason) for name in models}
            return row
        for name, model in models.items():
            try:
                row.variants[name] = _measure(layers, options, model(), x, mask, expected, picked)
            except Exception as error:  # whatever goes wrong costs a cell, Triton's own kinds of errors included
                row.variants[name] = Variant(reason=reason_of(error))
            free_memory()
    return row


def _measure(
    layers: Layers,
    options: Options,
    model: Any,
    x: torch.Tensor,
    mask: str | None,
    expected: torch.Tensor,
    picked: Sequence[int],
) -> Variant:
    import torch

    from mlakit.studies.layer_difference import difference
    from mlakit.studies.layer_steps import measure_call, require_memory

    batch, seq_len = x.shape[:2]
    require_memory(layers.shape, layers.device, batch, seq_len, seq_len)
    freqs = layers.freqs()[:seq_len]
    if hasattr(model, "make_cache"):
        call = partial(model, x, 0, freqs, mask, model.make_cache(batch, seq_len))
    else:  # somebody else's layer keeps its own cache, and takes the mask as DeepSeek's does
        hidden = torch.full((seq_len, seq_len), float("-inf"), device=x.device).triu_(1)
        call = partial(model, x, 0, freqs, None if mask is None else hidden)
    found = difference(call()[picked], expected)
    if not found.agrees(options.tolerance):
        text = f"wrong result: off by {found.relative:.3g}, its worst token by {found.worst_token:.3g}"
        return Variant(reason=text, wrong=True, relative=found.as_json()["relative"])
    measured = measure_call(call, options)
    timing = measured.timing
    return Variant(
        ms=timing.median * 1e3,
        ci95_ms=(timing.ci95[0] * 1e3, timing.ci95[1] * 1e3),
        host_ms=timing.host * 1e3 if timing.host is not None else None,
        temporary_mib=measured.temporary_mib,
        relative=found.relative,
    )


def run(args: argparse.Namespace) -> int:
    """Run the study; returns the exit code: 0, or 1 if a result was wrong or nothing could be timed.

    Raises:
        ValueError: bad input.
    """
    options = parse_common(args)
    if args.trials is None and not options.is_cuda:
        options = replace(options, trials=CPU_TRIALS)
    batch = whole("--batch-size", args.batch_size or (BATCH_SIZE if options.is_cuda else CPU_BATCH_SIZE), 1)
    lengths = whole_numbers("--seq-lengths", args.seq_lengths or SEQ_LENGTHS)
    make = parse_baseline(args.baseline)
    from mlakit.bench.files import write_atomically
    from mlakit.bench.table import make_console
    from mlakit.hardware import device_info
    from mlakit.studies.cpu_threads import steady_threads
    from mlakit.studies.layer_steps import Layers, stamp

    info, (shape,) = device_info(options.device), options.shapes
    layers = Layers(shape, options, batch, lengths[-1])
    layers.require_possible()
    output_file(args.output_json, "--output-json")
    output_file(args.output_csv, "--output-csv")
    kept = read_earlier(args.output_json, SCHEMA, resume=args.resume, flag="--output-json")
    mask = None if args.mask == "none" else args.mask
    print(f"{info.name}: {shape.title}, weights in {options.dtype}, mask {args.mask}")
    if not options.is_cuda:
        if args.model is args.batch_size is None:
            print(
                f"On a CPU the defaults are small, for under a minute: {options.model!r}, and a batch of {batch} "
                f"instead of {BATCH_SIZE}."
            )
        print("On a CPU every implementation runs in PyTorch: its times say nothing of a GPU's.")
    print(f"original: {'naive by the standard path' if make is None else args.baseline}\n")
    with nullcontext() if options.is_cuda else steady_threads() as threads:
        models = {
            "original": partial(layers.model, "naive", fast_path_tokens=0, **_NAIVE)
            if make is None
            else cache(partial(layers.adopt, make, fast_path_tokens=0, **_NAIVE)),
            "optimized": partial(layers.model, "naive", **_NAIVE),
            "fused": partial(layers.model, "fused"),
        }
        record: dict[str, Any] = {
            "schema": SCHEMA,
            **stamp(options),
            "options": {
                **asdict(options),
                "shapes": [shape.fields()],
                "batch_size": batch,
                "seq_lengths": lengths,
                "mask": args.mask,
                "baseline": args.baseline,
            },
            "cpu_threads": threads,
        }
        earlier = go_on(kept, args.output_json, record)
        rows = [Row.from_json(row) for row in earlier["rows"]]
        missing = [seq_len for seq_len in lengths if seq_len not in {row.seq_len for row in rows}]
        shown = table(make_console().width)
        print("\n".join([*shown.head(), *(shown.line(cells(row)) for row in rows)]), flush=True)
        with resumable(args.output_json), progress(len(missing), quiet=args.quiet) as begin:
            for seq_len in missing:
                begin(f"{seq_len} tokens")
                rows.append(measure_length(layers, options, batch, seq_len, mask, models))
                print(shown.line(cells(rows[-1])), flush=True)
                if args.output_json:
                    record |= {"complete": len(rows) == len(lengths), "rows": [row.as_json() for row in rows]}
                    write_atomically(args.output_json, json.dumps(record, indent=1, allow_nan=False) + "\n")
                if args.output_csv:
                    write_atomically(args.output_csv, csv_text(rows))
    print("\n".join(conclusion(rows, ours=make is None)))
    saved = [str(path) for path in (args.output_json, args.output_csv) if path]
    if saved and not args.quiet:
        print(f"saved: {', '.join(saved)}", file=sys.stderr)
    variants = [variant for row in rows for variant in row.variants.values()]
    return 1 if any(variant.wrong for variant in variants) or not any(variant.ms for variant in variants) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study with command-line arguments; returns the exit code (2 for bad input, with one line on stderr)."""
    return run_study("fast-path", __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
