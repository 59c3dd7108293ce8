"""The study `sparse-prefill`: how much faster is attention to selected keys (DeepSeek Sparse Attention) than to all of
them, naive and by kernels?

Every implementation is compared with float64 before it is timed, and what is printed as a finding is computed from what
was measured (`sparse_prefill_report`). The functions of the demonstration that this comes from are importable from
here, under its names and with its arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from mlakit.studies.checkpoint import go_on, read_earlier, resumable
from mlakit.studies.command import run_study
from mlakit.studies.cpu_threads import steady_threads
from mlakit.studies.method_rows import MethodResult
from mlakit.studies.sparse_prefill_options import (
    CONFIGS,
    D_QK,
    D_V,
    HEADS,
    MHA_D_QK,
    MHA_D_V,
    Options,
    add_arguments,
    parse_options,
)
from mlakit.studies.sparse_prefill_report import (
    DENSE,
    DENSE_MHA,
    DENSE_MQA,
    FLASH_MLA,
    NAIVE,
    SPARSE,
    WRONG,
    Row,
    complexity,
    csv_text,
    findings,
    footer,
    header,
    method_line,
    summary,
)

if TYPE_CHECKING:
    import torch

    from mlakit.studies.sparse_prefill_methods import benchmark_function as benchmark_function
    from mlakit.studies.sparse_prefill_methods import dense_mla_attention as dense_mla_attention
    from mlakit.studies.sparse_prefill_methods import generate_dense_test_data as generate_dense_test_data
    from mlakit.studies.sparse_prefill_methods import generate_sparse_test_data as generate_sparse_test_data
    from mlakit.studies.sparse_prefill_methods import naive_sparse_attention as naive_sparse_attention
    from mlakit.studies.sparse_prefill_methods import sparse_mla_attention as sparse_mla_attention

SCHEMA = "mlakit.sparse_prefill/1"
_CHECKED_TOKENS = 16  # of a dense result: all of it in float64 would take longer than all that is timed
_BYTES_A_SCORE = 12  # of a dense result on a CPU: a float32 score, its exponential and a mask


def __getattr__(name: str) -> Any:
    # Imported when used: the command's --help must not wait for torch.
    if name in {
        "benchmark_function", "dense_mla_attention", "generate_dense_test_data", "generate_sparse_test_data",
        "naive_sparse_attention", "sparse_mla_attention",
    }:  # fmt: skip
        from mlakit.studies import sparse_prefill_methods

        return getattr(sparse_prefill_methods, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def measure(options: Options, config: tuple[int, int, int]) -> Iterator[Row]:
    """Check and time every implementation on one configuration; yields the row anew after each of them."""
    from mlakit.studies.layer_steps import free_memory, reason_of
    from mlakit.studies.sparse_prefill_methods import generate_sparse_test_data

    s_q, s_kv, topk = config
    row = Row(s_q, s_kv, topk, options.heads, D_QK, D_V)
    try:
        q, kv, indices = generate_sparse_test_data(1, s_q, s_kv, topk, options.heads, 1, D_QK, device=options.device)
    except Exception as error:
        row.methods[SPARSE] = MethodResult(reason=reason_of(error))
        yield row
        return
    inputs = (q[0], kv[0], indices[0])
    sparse = _Sparse(inputs)
    steps: list[tuple[str, Callable[[], MethodResult]]] = [(NAIVE, partial(_naive, options, sparse, row))]
    if options.dense:
        steps += [(name, partial(_dense, options, name, row, inputs)) for name in (DENSE, DENSE_MHA, DENSE_MQA)]
    steps += [(name, partial(_kernel, options, name, sparse)) for name in (SPARSE, FLASH_MLA)]
    for name, step in steps:
        try:
            row.methods[name] = step()
        except Exception as error:  # an implementation that fails costs its own time only
            row.methods[name] = MethodResult(reason=reason_of(error))
        free_memory()
        yield row


class _Sparse:
    """The inputs of the sparse implementations, and what is right for them."""

    def __init__(self, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        self.inputs = inputs
        self.eager: torch.Tensor | None = None
        self.reference: torch.Tensor | None = None

    def why_wrong(self, call: Callable[[], torch.Tensor]) -> str:
        """Run a call on memory that holds no answer, and say why its result is wrong, or ""."""
        from mlakit.studies.sparse_prefill_methods import naive_sparse_attention
        from mlakit.testing import compare, poison_

        q, kv, indices = self.inputs
        scale = 1 / math.sqrt(q.shape[-1])
        if self.eager is None or self.reference is None:
            self.eager = naive_sparse_attention(q, kv, indices, scale, D_V)
            self.reference = naive_sparse_attention(q.double(), kv.double(), indices, scale, D_V)
        poison_(call())
        return compare(call(), self.reference, self.eager).reason


def _naive(options: Options, sparse: _Sparse, row: Row) -> MethodResult:
    from mlakit.studies.sparse_prefill_methods import naive_sparse_attention, tokens_a_chunk

    q, kv, indices = sparse.inputs
    row.naive_chunk = tokens_a_chunk(q, row.topk)
    call = partial(naive_sparse_attention, q, kv, indices, 1 / math.sqrt(D_QK), D_V, chunk=row.naive_chunk)
    return _checked(options, call, sparse.why_wrong(call))


def _kernel(options: Options, name: str, sparse: _Sparse) -> MethodResult:
    from mlakit.studies import sparse_prefill_methods as methods

    scale = 1 / math.sqrt(D_QK)
    call = partial(methods.sparse_mla_attention, *sparse.inputs, scale, D_V)
    if name == FLASH_MLA:
        kernel = methods.find_flash_mla() if options.is_cuda else "needs a GPU"
        if isinstance(kernel, str):
            return MethodResult(reason=kernel)
        call = partial(methods.flash_mla_attention, kernel, *sparse.inputs, scale, D_V)
    return _checked(options, call, sparse.why_wrong(call))


def _dense(options: Options, name: str, row: Row, inputs: tuple[torch.Tensor, ...]) -> MethodResult:
    import torch

    from mlakit.studies.layer_steps import free_memory
    from mlakit.studies.sparse_prefill_methods import dense_mla_attention, generate_dense_test_data
    from mlakit.testing import poison_

    if name == DENSE_MQA:  # the queries and keys that the sparse ones have
        q, k = inputs[0][None], inputs[1][None]
        _require_memory(options, row, 0, 0)
        v = k[..., :D_V]
    else:
        widths = (MHA_D_QK, MHA_D_V) if name == DENSE_MHA else (D_QK, D_V)
        _require_memory(options, row, *widths)
        q, k, v = generate_dense_test_data(1, row.s_q, row.s_kv, row.heads, *widths, device=options.device)
    scale = 1 / math.sqrt(q.shape[-1])
    call = partial(dense_mla_attention, q, k, v, scale)
    poison_(call())
    free_memory()
    out = call()[0]
    tokens = torch.arange(0, row.s_q, -(-row.s_q // _CHECKED_TOKENS), device=out.device)
    reason = ""
    for head in {0, row.heads - 1}:
        mine = (q[0, tokens, head], k[0, :, min(head, k.shape[2] - 1)], v[0, :, min(head, k.shape[2] - 1)])
        reason = reason or _why_dense_wrong(out[tokens, head], mine, scale)
    del out
    return _checked(options, call, reason)


def _why_dense_wrong(out: torch.Tensor, inputs: tuple[torch.Tensor, ...], scale: float) -> str:
    import torch

    from mlakit.testing import compare

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.T).to(torch.float64 if q.dtype == torch.float64 else torch.float32) * scale
        return torch.softmax(scores, dim=-1).to(q.dtype) @ v

    return compare(out, attend(*(x.double() for x in inputs)), attend(*inputs)).reason


def _require_memory(options: Options, row: Row, d_qk: int, d_v: int) -> None:
    """Refuse what cannot fit: a CPU's system would end the process.

    Raises:
        MemoryError: the inputs, or on a CPU the scores, take more than is free.
    """
    import torch

    from mlakit.bench.memory import available_bytes

    needed = 2 * row.heads * (d_qk + d_v) * (row.s_kv + row.s_q)
    if not options.is_cuda:
        needed += _BYTES_A_SCORE * row.heads * row.s_q * row.s_kv
    free = available_bytes(torch.device(options.device))
    if needed > free:
        raise MemoryError(f"it takes {needed / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free")


def _checked(options: Options, call: Callable[[], torch.Tensor], why_wrong: str) -> MethodResult:
    import torch

    from mlakit.bench.memory import measure_peak
    from mlakit.bench.timing import time_calls

    if why_wrong:
        print(f"{WRONG}: {why_wrong}", file=sys.stderr)
        return MethodResult(reason=WRONG)
    device = torch.device(options.device)
    peak = measure_peak(call, device)["memory_temporary_mb"]
    timing = time_calls([call], device, l2="cold", repeats=options.rep, warmup=options.warmup)
    return MethodResult(timing.mean, timing.median, timing.std, timing.ci95, peak)


def run(args: argparse.Namespace) -> int:
    """Run the study; returns the exit code: 0, or 1 if a result was wrong or the sparse kernel was never timed.

    Raises:
        ValueError: bad input.
    """
    options = parse_options(args)
    from mlakit.bench.environment import describe_environment
    from mlakit.bench.files import output_file, write_atomically
    from mlakit.bench.limits import gpu_ceilings
    from mlakit.hardware import device_info

    output_file(args.output_json, "--output-json")
    output_file(args.output_csv, "--output-csv")
    output_file(args.plot, "--plot")
    kept = read_earlier(args.output_json, SCHEMA, resume=args.resume, flag="--output-json")
    info = device_info(options.device)
    ceilings = gpu_ceilings(options.device)
    print(f"Using device: {info.name}")
    if not info.is_cuda:
        if args.configs is None:
            last, there = options.configs[-1], CONFIGS[-1]
            print(f"On a CPU the configurations are scaled down: up to {last} (s_q, s_kv, topk) instead of {there},")
            print(f"and {options.heads} query heads instead of {HEADS}.")
        print("mlakit's kernels need a GPU; the lines named after them time the references that define them.")
    with nullcontext() if info.is_cuda else steady_threads() as threads:
        if threads == 1 < info.units:
            print("Other processes keep cores busy: PyTorch gets one thread, as several would wait for each other.")
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "environment": describe_environment(info),
            "options": asdict(options),
            "ceilings": asdict(ceilings) if ceilings else None,
        }
        earlier = go_on(kept, args.output_json, record)
        rows = [Row.from_json(row) for row in earlier["rows"]]

        def save() -> None:
            if args.output_json:
                record.update(complete=len(rows) == len(options.configs), rows=[row.as_json() for row in rows])
                write_atomically(args.output_json, json.dumps(record, indent=1) + "\n")
            if args.output_csv:
                write_atomically(args.output_csv, csv_text(rows))

        with resumable(args.output_json):
            for line in _report(options, rows, save):
                print(line, flush=True)
    if args.plot:
        from mlakit.studies.sparse_prefill_plot import plot

        plot(rows, info.name, args.plot)
    for path in (args.output_json, args.output_csv, args.plot):
        if path is not None and not args.quiet:
            print(f"saved: {path}", file=sys.stderr)
    wrong = any(result.reason == WRONG for row in rows for result in row.methods.values())
    return 1 if wrong or not any(row.mean(SPARSE) for row in rows) else 0


def _report(options: Options, rows: list[Row], save: Callable[[], None]) -> Iterator[str]:
    """The lines to print, while `rows` grows by what is not in it yet; `save` is called after each row."""
    for config in options.configs:
        known = next((row for row in rows if (row.s_q, row.s_kv, row.topk) == config), None)
        if known is not None:
            yield from header(known)
            yield from (method_line(known, name) for name in known.methods)
            yield from footer(known)
            continue
        row = None
        for row in measure(options, config):
            if len(row.methods) == 1:
                yield from header(row)
            yield method_line(row, list(row.methods)[-1])
        assert row is not None  # `measure` yields at least one
        rows.append(row)
        save()
        yield from footer(row)
    yield from summary(rows)
    yield from complexity(rows)
    yield from findings(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study with command-line arguments; returns the exit code (2 for bad input, with one line on stderr)."""
    return run_study("sparse-prefill", __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
