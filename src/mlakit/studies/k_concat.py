"""The study `k-concat`: is a direct copy faster than torch.cat for building MLA's keys, and how near does either get to
a copy's speed?

Nothing here is a foregone conclusion: what is printed as one is computed from what was measured (`k_concat_report`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from mlakit.studies.checkpoint import go_on, read_earlier, resumable
from mlakit.studies.command import run_study
from mlakit.studies.cpu_threads import steady_threads
from mlakit.studies.k_concat_options import (
    BATCH_SIZES,
    NUM_ITERS,
    NUM_WARMUP,
    Options,
    add_arguments,
    parse_options,
)
from mlakit.studies.k_concat_options import NUM_HEADS as NUM_HEADS
from mlakit.studies.k_concat_options import PE_DIM as PE_DIM
from mlakit.studies.k_concat_options import QK_NOPE_HEAD_DIM as QK_NOPE_HEAD_DIM
from mlakit.studies.k_concat_report import StudyRow, banner, cells, conclusion, memory_table, summary, table
from mlakit.studies.method_rows import MethodResult

if TYPE_CHECKING:
    import torch

    from mlakit.bench.timing import Timing

SCHEMA = "mlakit.k_concat/1"

Method = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def cat_method(k_nope: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    """Concatenate k_nope [B, H, Dn] and k_pe [B, 1, Dr] to [B, H, Dn + Dr] by `torch.cat` with `expand`."""
    from mlakit.concat import concat_k

    return concat_k(k_nope, k_pe, impl="cat")


def direct_copy_method(k_nope: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    """The same by assigning the two slices of an empty tensor."""
    from mlakit.concat import concat_k

    return concat_k(k_nope, k_pe, impl="direct_copy")


def triton_method(k_nope: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    """The same by mlakit's kernel."""
    from mlakit.concat import concat_k

    return concat_k(k_nope, k_pe, impl="triton")


METHODS: dict[str, Method] = {"cat": cat_method, "direct_copy": direct_copy_method, "triton": triton_method}


def benchmark_method(
    method: Method, k_nope: torch.Tensor, k_pe: torch.Tensor, num_warmup: int = NUM_WARMUP, num_iters: int = NUM_ITERS
) -> float:
    """Mean milliseconds of a call, allocation of the result included, from memory and not from the L2 cache.

    Raises:
        ValueError: `num_iters` is below 1 or `num_warmup` below 0.
    """
    return _time(method, k_nope, k_pe, num_warmup, num_iters).mean * 1e3


def _time(method: Method, k_nope: torch.Tensor, k_pe: torch.Tensor, num_warmup: int, num_iters: int) -> Timing:
    from mlakit.bench.timing import time_calls

    return time_calls([partial(method, k_nope, k_pe)], k_nope.device, l2="cold", repeats=num_iters, warmup=num_warmup)


def measure(options: Options, dtype: str, batch: int, copy_bytes_per_s: float | None) -> StudyRow:
    """Check and time every method on one batch.

    A method whose result is not bit for bit the same as a row-by-row copy gets no time, and one that runs out of memory
    says so.
    """
    import torch

    from mlakit.bench.memory import measure_peak

    device, element = torch.device(options.device), getattr(torch, dtype)
    row = StudyRow(
        dtype=dtype,
        batch=batch,
        element_bytes=element.itemsize,
        heads=options.heads,
        nope=options.nope,
        rope=options.rope,
        copy_bytes_per_s=copy_bytes_per_s,
    )
    try:
        generator = torch.Generator(device).manual_seed(batch)
        k_nope = torch.randn(batch, options.heads, options.nope, device=device, generator=generator).to(element)
        k_pe = torch.randn(batch, 1, options.rope, device=device, generator=generator).to(element)
    except torch.OutOfMemoryError:
        for name in _methods(device):
            row.methods[name] = MethodResult(reason="out of memory")
        return row
    for name in _methods(device):
        method = METHODS[name]
        try:
            if not _is_right(method(k_nope, k_pe), k_nope, k_pe):
                row.methods[name] = MethodResult(reason="wrong result")
                continue
            timing = _time(method, k_nope, k_pe, options.num_warmup, options.num_iters)
            peak = measure_peak(partial(method, k_nope, k_pe), device)["memory_temporary_mb"]
        except torch.OutOfMemoryError:
            row.methods[name] = MethodResult(reason="out of memory")
            continue
        low, high = timing.ci95
        row.methods[name] = MethodResult(timing.mean, timing.median, timing.std, (low, high), peak_mib=peak)
    return row


def _methods(device: torch.device) -> tuple[str, ...]:
    return tuple(METHODS) if device.type == "cuda" else ("cat", "direct_copy")


def _is_right(out: torch.Tensor, k_nope: torch.Tensor, k_pe: torch.Tensor) -> bool:
    import torch

    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[out.element_size()]
    nope = k_nope.shape[-1]
    found, left, right = (tensor.view(integer) for tensor in (out, k_nope, k_pe))
    return bool((found[..., :nope] == left).all() and (found[..., nope:] == right).all())


def run(args: argparse.Namespace) -> int:
    """Run the study; returns the exit code: 0, or 1 if a result was wrong or nothing could be timed.

    Raises:
        ValueError: bad input.
    """
    options = parse_options(args)
    from mlakit.bench.environment import describe_environment
    from mlakit.bench.files import output_file, write_atomically
    from mlakit.bench.limits import gpu_ceilings
    from mlakit.bench.units import rate
    from mlakit.hardware import device_info

    output_file(args.output_json, "--output-json")
    output_file(args.plot, "--plot")
    kept = read_earlier(args.output_json, SCHEMA, resume=args.resume, flag="--output-json")
    info = device_info(options.device)
    ceilings = gpu_ceilings(options.device)
    if not info.is_cuda:
        if args.batch_sizes is None:
            sizes = f"{options.batch_sizes[0]} to {options.batch_sizes[-1]}"
            print(f"On a CPU the batch list is scaled down: {sizes} instead of {BATCH_SIZES[0]} to {BATCH_SIZES[-1]}.")
        print("mlakit's kernel needs a GPU; the two PyTorch methods are measured alone.")
    copy_rate = ceilings.copy_bytes_per_s if ceilings else None
    with nullcontext() if info.is_cuda else steady_threads() as threads:
        if threads == 1 < info.units:
            print("Other processes keep cores busy: PyTorch gets one thread, as several would wait for each other.")
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "environment": describe_environment(info),
            "options": asdict(options),
            "cpu_threads": threads,
            "ceilings": asdict(ceilings) if ceilings else None,
        }
        earlier = go_on(kept, args.output_json, record)
        rows = [StudyRow.from_json(row) for row in earlier["rows"]]

        def save() -> None:
            if args.output_json:
                complete = len(rows) == len(options.dtypes) * len(options.batch_sizes)
                record.update(complete=complete, rows=[row.as_json() for row in rows])
                write_atomically(args.output_json, json.dumps(record, indent=1) + "\n")

        with resumable(args.output_json):
            for line in _report(options, copy_rate, rows, save):
                print(line, flush=True)
    if ceilings:
        print(f"\n{info.name}: copy ceiling {rate(ceilings.copy_bytes_per_s, 'B/s')}, measured in this run")
    if args.plot:
        from mlakit.studies.k_concat_plot import plot

        plot(rows, info.name, args.plot)
    for path in (args.output_json, args.plot):
        if path is not None and not args.quiet:
            print(f"saved: {path}", file=sys.stderr)
    results = [result for row in rows for result in row.methods.values()]
    wrong = any(result.reason == "wrong result" for result in results)
    return 1 if wrong or not any(result.mean for result in results) else 0


def _report(options: Options, copy_rate: float | None, rows: list[StudyRow], save: Callable[[], None]) -> Iterator[str]:
    """The lines to print, while `rows` grows by what is not in it yet; `save` is called after each row."""
    from mlakit.bench.table import make_console

    shown = table(copy_rate is not None, make_console().width)
    for dtype in options.dtypes:
        yield from banner(dtype, options.heads, options.nope, options.rope)
        yield from shown.head()
        mine = []
        for batch in options.batch_sizes:
            row = next((row for row in rows if (row.dtype, row.batch) == (dtype, batch)), None)
            if row is None:
                row = measure(options, dtype, batch, copy_rate)
                rows.append(row)
                save()
            mine.append(row)
            yield shown.line(cells(row))
        yield from summary(mine)
        yield from memory_table(mine)
        yield from conclusion(mine)
        yield ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study with command-line arguments; returns the exit code (2 for bad input, with one line on stderr)."""
    return run_study("k-concat", __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
