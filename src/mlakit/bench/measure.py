"""One row from start to end, inside a worker: availability, workload, check, time, limit."""

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlakit.backends import registry
from mlakit.backends.base import Backend, Unavailable, UnsupportedError
from mlakit.backends.pipeline import Result, prepare
from mlakit.bench.batch_spec import BatchRequest
from mlakit.bench.check import Expected, Verdict, check_part, expectation, judge
from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.gpu_state import GpuMonitor
from mlakit.bench.limits import Ceilings
from mlakit.bench.memory import available_bytes, measure_peak
from mlakit.bench.results import BenchmarkResult, CheckRow, LimitRow, Status, TimingRow
from mlakit.bench.timing import capture, time_calls
from mlakit.bench.work import Work, mla_candidates, standard_work
from mlakit.bench.workload import DTYPES, Part, PartName, build, estimate_bytes, split_requests
from mlakit.dims import StandardDims
from mlakit.hardware import DeviceInfo, device_info

# The fields of a config that decide what the tensors hold: backends that share them share the expected output.
_WORKLOAD_FIELDS = (
    "batch_spec", "attention", "num_q_heads", "num_kv_heads", "head_dim", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "num_layers", "block_size", "dtype", "device", "scope", "seed",
)  # fmt: skip
_GIB = 2**30


class Refusal(Exception):
    """A row that ends without a time, for a reason that is no surprise."""

    def __init__(self, status: Status, reason: str, check: CheckRow | None = None) -> None:
        super().__init__(reason)
        self.status: Status = status
        self.reason = reason
        self.check = check


@dataclass
class _Job:
    """A row being measured."""

    config: BenchmarkConfig
    backend: Backend
    requests: dict[PartName, list[BatchRequest]]
    parts: list[Part]
    runs: list[Callable[[Any], Result]]
    scratch: Path | None

    def expected(self, part: Part, layer: int) -> Expected:
        """What a part's output must be."""
        key = {name: getattr(self.config, name) for name in _WORKLOAD_FIELDS}
        key |= {"split": {name: len(requests) for name, requests in self.requests.items()}, "torch": torch.__version__}
        return expectation(part, layer, self.mode(part.name), self.scratch, key)

    def mode(self, name: PartName) -> str:
        """Which of MLA's modes runs a part; "standard" for standard attention."""
        return "standard" if name == "all" else self.backend.mode(name)

    def check(self) -> CheckRow | None:
        """Every part, on its first layer and its last: a backend that holds on to the first one's tensors is right on
        that alone.
        """
        layers = sorted({0, self.config.num_layers - 1})
        verdicts = [
            check_part(run, part, layer, self.expected(part, layer))
            for part, run in zip(self.parts, self.runs, strict=True)
            for layer in layers
        ]
        _require_right(verdicts, "")
        return _check_row(verdicts)

    def check_again(self, call: Callable[[], list[Result]]) -> None:
        """The timed callable itself, after timing: a graph that replays something else, or state that wears out, shows
        here.
        """
        for part in self.parts:
            part.problem.poison()
        pairs = zip(self.parts, call(), strict=True)
        verdicts = [judge(out, lse, self.expected(part, 0), part.name) for part, (out, lse) in pairs]
        _require_right(verdicts, "right before timing, not after: ")

    def run_layer(self, layer: int) -> list[Result]:
        """The whole batch on one layer: what is timed."""
        return [run(part.layers[layer]) for part, run in zip(self.parts, self.runs, strict=True)]


def measure_row(
    config: BenchmarkConfig,
    ceilings: Ceilings,
    scratch: Path | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> BenchmarkResult:
    """Measure one row. `stage` is told what is going on, for whoever waits; `scratch` is a folder for expected outputs.

    Raises:
        Exception: whatever the backend raised that is no out-of-memory; the worker turns it into a row.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    row: dict[str, Any] = {"config": config, "started": started.isoformat(timespec="seconds")}
    try:
        _measure(config, ceilings, scratch, stage, row)
    except Refusal as refusal:
        reason = "; ".join([refusal.reason, *getattr(refusal, "__notes__", [])])
        row.update(status=refusal.status, error=reason, check=refusal.check)
    except UnsupportedError as error:
        row.update(status="unsupported", error=str(error))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        row.update(status="out_of_memory", error=first_line(error))
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            with contextlib.suppress(RuntimeError):  # after a CUDA error it fails too, and would hide the first one
                torch.cuda.empty_cache()
    return BenchmarkResult(**row, seconds=time.perf_counter() - clock)


def _measure(
    config: BenchmarkConfig, ceilings: Ceilings, scratch: Path | None, stage: Callable[[str], None], row: dict[str, Any]
) -> None:
    device = torch.device(config.device)
    info = device_info(device)
    if config.cuda_graph and not info.is_cuda:
        raise Refusal("unsupported", "CUDA graphs need a GPU")
    backend, row["backend_version"] = _available(config, info)
    requests = split_requests(config, backend.default_reorder_batch_threshold)
    row["limit"] = limit_of(config, requests, ceilings)

    stage("building")
    needed, free = estimate_bytes(config, requests), available_bytes(device)
    if needed > free:
        raise Refusal("out_of_memory", f"the workload needs {needed / _GIB:.1f} GiB, {free / _GIB:.1f} GiB are free")
    parts = build(config, requests, device)
    for part in parts:
        if reason := backend.refusal(part.problem):
            raise Refusal("unsupported", reason)
    stage("preparing")
    try:
        _run(_prepared(config, backend, requests, parts, scratch, row), info, stage, row)
    except Exception as error:
        for limit in filter(None, (backend.known_limit(part.problem) for part in parts)):
            error.add_note(limit)
        raise
    finally:
        row["kernels"] = {part.name: part.problem.kernel for part in parts if part.problem.kernel}


def _prepared(
    config: BenchmarkConfig,
    backend: Backend,
    requests: dict[PartName, list[BatchRequest]],
    parts: list[Part],
    scratch: Path | None,
    row: dict[str, Any],
) -> _Job:
    parameters = _own_parameters(backend, config)
    runs = [prepare(backend, part.problem, parameters) for part in parts]
    job = _Job(config, backend, requests, parts, runs, scratch)
    row["modes"] = {name: job.mode(name) for name in requests}
    return job


def _run(job: _Job, info: DeviceInfo, stage: Callable[[str], None], row: dict[str, Any]) -> None:
    config, device = job.config, torch.device(job.config.device)
    if config.check:
        stage("checking")
        row["check"] = job.check()
    calls: list[Callable[[], list[Result]]] = [partial(job.run_layer, layer) for layer in range(config.num_layers)]
    if config.cuda_graph:
        stage("capturing")
        calls = [_replay(call) for call in calls]
    stage("timing")
    with GpuMonitor(info) as monitor:
        timing = time_calls(calls, device, l2=config.l2, repeats=config.repeats, warmup=config.warmup_iters)
    row["gpu"] = monitor.state
    if config.check:
        job.check_again(calls[0])
    if config.profile_memory:
        stage("measuring memory")
        row.update(measure_peak(calls[0], device))
    figures = {name: getattr(timing, name) for name in TimingRow.model_fields if name != "samples"}
    row["timing"] = TimingRow(**figures, samples=list(timing.samples))


def _available(config: BenchmarkConfig, info: DeviceInfo) -> tuple[Backend, str]:
    try:
        backend = registry.load(config.backend)
    except ValueError as error:
        raise Refusal("unavailable", str(error)) from error
    if config.attention not in backend.attention:
        does = " and ".join(sorted(backend.attention))
        raise Refusal("unsupported", f"{backend.name} computes {does} attention, not {config.attention}")
    if unknown := sorted(set(config.parameters) - set(backend.parameters)):
        has = ", ".join(backend.parameters) or "none"
        raise Refusal("unsupported", f"{backend.name} has no parameter {unknown[0]}; it has: {has}")
    found = backend.availability(info)
    if isinstance(found, Unavailable):
        raise Refusal("unavailable", found.reason)
    return backend, found.version


def _own_parameters(backend: Backend, config: BenchmarkConfig) -> dict[str, int | str]:
    parsed = {name: backend.parameters[name].parse(value) for name, value in config.parameters.items()}
    return {name: value for name, value in parsed.items() if value != "auto"}


def _replay(call: Callable[[], list[Result]]) -> Callable[[], list[Result]]:
    results: list[list[Result]] = []
    graph = capture(lambda: results.append(call()))
    captured = results[-1]  # a replay fills these tensors again

    def replay() -> list[Result]:
        graph.replay()
        return captured

    return replay


def _require_right(verdicts: list[Verdict], prefix: str) -> None:
    for verdict in verdicts:
        if verdict.status != "ok":
            raise Refusal(verdict.status, f"{prefix}{verdict.reason}", _check_row(verdicts))


def _check_row(verdicts: list[Verdict]) -> CheckRow | None:
    comparisons = [v.comparison for v in verdicts if v.comparison is not None]
    if not comparisons:
        return None
    worst = next((c for c in comparisons if not c.ok), None) or max(
        comparisons, key=lambda c: c.max_error / (c.max_error_allowed or 1.0)
    )
    errors = {name: getattr(worst, name) for name in CheckRow.model_fields if name != "lse_error"}
    return CheckRow(**errors, lse_error=max((v.lse_error for v in verdicts if v.lse_error is not None), default=None))


def limit_of(config: BenchmarkConfig, parts: dict[PartName, list[BatchRequest]], ceilings: Ceilings) -> LimitRow:
    """The least time for the batch: each pipeline's requests in whichever mode is cheaper on this device."""
    size = DTYPES[config.dtype].itemsize
    dims = config.dims()
    total = Work(0, 0)
    for name, requests in parts.items():
        if isinstance(dims, StandardDims):
            total += standard_work(requests, dims, size)
        elif name != "all":
            candidates = mla_candidates(requests, dims, size, name, config.scope)
            total += min(candidates.values(), key=lambda work: ceilings.limit(work.flops, work.bytes)[0])
    seconds, bound = ceilings.limit(total.flops, total.bytes)
    return LimitRow(flops=total.flops, bytes=total.bytes, seconds=seconds, bound=bound)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: PyTorch's on a GPU, its allocator's on a CPU, or Python's."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, behind its type, and its notes."""
    lines = [*str(error).strip().splitlines()[:1], *getattr(error, "__notes__", [])]
    return f"{type(error).__name__}: {'; '.join(lines)}" if lines else type(error).__name__
