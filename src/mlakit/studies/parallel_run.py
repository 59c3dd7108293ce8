"""The study `parallel` in a rank: what every one of them does, and what the first one writes."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlakit.bench.environment import describe_environment
from mlakit.bench.files import write_atomically
from mlakit.bench.limits import measure_ceilings
from mlakit.bench.units import rate, seconds
from mlakit.distributed.exchange import Messages
from mlakit.distributed.group import Ranks, process_group
from mlakit.hardware import device_info
from mlakit.studies.layer_difference import difference
from mlakit.studies.layer_options import TOLERANCE
from mlakit.studies.layer_steps import free_memory, reason_of
from mlakit.studies.parallel_clock import Clock, Monitor, agreed, describe, everyone, timing_fields
from mlakit.studies.parallel_options import Link, Options
from mlakit.studies.parallel_parts import (
    Attention,
    Batch,
    LayerStep,
    expected_of_layer,
    layer_args,
    mesh_of,
    traffic,
    whole_layer,
)
from mlakit.studies.parallel_report import Plan, Row, csv_text, findings, groups, header, plans_of, table
from mlakit.testing import compare

SCHEMA = "mlakit.parallel/1"
COLLECTIVES = ("all_to_all", "all_gather", "all_reduce")
# Elements of bfloat16 that go from one rank to another.
_SMALL, _LARGE, _LARGE_CPU = 1024, 2**26, 2**22


@dataclass
class Study:
    """One rank's view of the whole run."""

    here: Ranks
    options: Options
    links: dict[str, Link]
    rows: list[Row]
    save: Callable[[], None]


def run_rank(options: Options, folder: Path, record_path: Path) -> int:
    """Measure everything with the other ranks; the first prints and writes. Returns the exit code."""
    # Graphs that are timed run alone: between them the host waits, and barriers have a communicator of their own.
    graphs_alone = options.mode == "graph"
    with process_group(options.device, timeout=options.timeout, graphs_alone=graphs_alone) as here, torch.no_grad():
        return _run(here, options, folder, record_path)


def _run(here: Ranks, options: Options, folder: Path, record_path: Path) -> int:
    info = device_info(here.device)
    first = here.rank == 0
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**describe_environment(info), **_nccl(info.is_cuda)},
        "ranks": describe(here),
        "options": options.as_json(),
    }
    ceilings = everyone(asdict(measure_ceilings(here.device)) if info.is_cuda else None, here)
    free_memory()
    with Clock(here, options.mode, "hot", 20) as clock:
        measured = measure_links(here, clock) if here.size > 1 else {}
    links = measured or (dict.fromkeys(COLLECTIVES, options.link) if options.link else {})
    # The slowest GPU's: it is the one that a limit of all must hold for.
    record["ceilings"] = ceilings[0] and {
        key: min(one[key] for one in ceilings) if isinstance(value, float) else value
        for key, value in ceilings[0].items()
    }
    record["links"] = {name: asdict(link) for name, link in links.items()}
    record["links_measured"] = bool(measured)
    rows: list[Row] = []

    def save() -> None:
        if first:
            record["rows"] = [row.as_json() for row in rows]
            write_atomically(record_path, json.dumps(record, indent=1, allow_nan=False) + "\n")

    record["complete"] = False
    study = Study(here, options, links, rows, save)
    if first:
        for line in introduction(here, info.name, options, measured):
            print(line)
        print(f"\n{header()}", flush=True)
    for spec in options.batch_specs:
        _measure_batch(study, spec)
        free_memory()
    record["complete"] = True
    save()
    if first:
        finish(rows, record, folder, record_path)
    # A rank's exit code is all that the others' launcher sees of it.
    return 1 if any(row.wrong for row in rows) or not any(row.median for row in rows) else 0


def introduction(here: Ranks, name: str, options: Options, links: dict[str, Link]) -> list[str]:
    """What is measured, and how."""
    lines = [
        f"{here.size} x {name}: {options.model}, {options.dims.num_heads} heads",
        f"Median of the slowest rank (one alone: of the fastest), {options.l2} cache, "
        + ("each step replayed from a CUDA graph" if options.mode == "graph" else "launched each time")
        + "; a barrier before each sample; parts are timed alone; "
        + ("checked against float64." if options.check else "not checked (--no-check)."),
    ]
    if links:
        each = ", ".join(
            f"{name} {seconds(link.latency)} and {rate(link.bandwidth, 'B/s')}" for name, link in links.items()
        )
        lines.append(f"Between ranks, an empty message and the rate of a large one: {each}.")
    if here.size == 1 and not options.simulate:
        lines.append(
            "One rank: there is nothing to divide. --simulate-ranks with a link predicts what more would give."
        )
    if here.device.type == "cpu":
        lines.append("On a CPU the ranks share its cores and memory: its times say nothing of GPUs.")
    return lines


def measure_links(here: Ranks, clock: Clock) -> dict[str, Link]:
    """Of each collective that the plans use: seconds of a message of 2 KiB, and bytes a second that leave a rank."""
    mesh = mesh_of(here.device.type, 1, here.size)["cp"]
    large = _LARGE if here.device.type == "cuda" else _LARGE_CPU
    found = {}
    for name in COLLECTIVES:
        times = []
        for size in (_SMALL, large):
            buffer = torch.zeros(here.size * size, dtype=torch.bfloat16, device=here.device)
            whole = Messages(buffer.view(here.size, size), (1, 1, size), torch.float32)
            own = Messages(buffer[None, :size], (1, 1, size), torch.float32)
            calls: dict[str, Callable[[], object]] = {
                "all_to_all": lambda whole=whole: whole.swapped(mesh),  # type: ignore[misc]
                "all_gather": lambda own=own: own.gathered(mesh),  # type: ignore[misc]
                "all_reduce": lambda buffer=buffer: dist.all_reduce(buffer[: buffer.numel() // here.size]),  # type: ignore[misc]
            }
            times.append(clock.time(clock.capture(calls[name])).median)
            clock.release()
        others = 2 * (here.size - 1) / here.size if name == "all_reduce" else here.size - 1
        sent = others * 2 * (large - _SMALL)
        found[name] = Link(times[0], sent / max(times[1] - times[0], 1e-9))
    return found


def _plans(options: Options, ranks: int) -> list[Plan]:
    return [plan for name in options.strategies for plan in plans_of(name, ranks, options.context_ranks)]


def _measure_batch(study: Study, spec: str) -> None:
    here, options = study.here, study.options
    batch: Batch | None = None
    expected: Any = None
    for scope in options.scopes:
        mine: list[Row] = []
        whole = None
        failed = ""
        try:
            batch = batch or Batch(spec, options, here.device)
            if scope == "layer":
                whole = whole_layer(layer_args(options, batch), here, options.seed)
            if options.check:
                expected = batch.expected() if scope == "attention" else expected_of_layer(batch, whole)  # type: ignore[arg-type]
        except Exception as error:
            failed = reason_of(error)
        failed = agreed(failed, here)
        free_memory()
        for plan in _plans(options, here.size):
            if scope == "layer" and plan.strategy == "cp-own":
                continue
            row = Row(scope, spec, plan, options.mode, reason=failed)
            mine.append(row)
            study.rows.append(row)
            if not failed:
                assert batch is not None
                _measure(study, row, batch, whole, expected)
            free_memory()
            study.save()
        if scope == "attention" and options.simulate and batch is not None and not failed:
            predicted = list(_predict(study, batch))
            mine += predicted
            study.rows += predicted
        if here.rank == 0:
            print("\n".join(table(mine)), flush=True)
        study.save()


def _measure(study: Study, row: Row, batch: Batch, whole: Any, expected: Any) -> None:
    """Fill in a row; what fails on one rank is a reason on all."""
    here, options = study.here, study.options
    job: Attention | LayerStep | None = None
    with Clock(here, options.mode, options.l2, options.repeats) as clock:
        try:
            job = (
                Attention(batch, row.plan, here)
                if row.scope == "attention"
                else LayerStep(batch, row.plan, here, whole)
            )
        except Exception as error:
            row.reason = reason_of(error)
        row.reason = agreed(row.reason, here)
        if row.reason or job is None:
            return
        call = clock.capture(job)
        if options.mode == "eager":
            job()
        together = row.plan.ranks > 1
        # What is checked is what is timed: the graph's own output, from memory that held no answer.
        job.last.fill_(torch.nan)
        call()
        if expected is not None:
            _check(row, job, batch, expected, here)
            if row.wrong:
                return
        with Monitor(here) as monitor:
            spread = clock.time(call, together=together)
        row.gpus = monitor.states
        for name, value in timing_fields(spread).items():
            setattr(row, name, value)
        parts = job.parts()
        for name in ("attention", "merge", "communication"):
            part = getattr(parts, name)
            if part is not None:
                row.parts[name] = clock.time(clock.capture(part), together=together, part=True).median
        row.parts["rest"] = spread.median - sum(row.parts.values())
        if row.plan.ranks > 1:
            _add_floor(row, batch, study.links)


def _add_floor(row: Row, batch: Batch, links: dict[str, Link]) -> None:
    row.sent = {}
    floor = 0.0
    for name, bytes_ in traffic(row.plan, batch, layer=row.scope == "layer"):
        row.sent[name] = row.sent.get(name, 0) + bytes_
        floor += bytes_ / links[name].bandwidth
    row.floor = floor or None


def _check(row: Row, job: Attention | LayerStep, batch: Batch, expected: Any, here: Ranks) -> None:
    out = job.last[batch.picked]
    if isinstance(job, Attention):
        reference, eager = expected
        found = compare(out, reference[:, :, job.heads], eager[:, :, job.heads])
        error, allowed, wrong = found.rms_error, found.rms_error_allowed, found.reason
    else:
        apart = difference(out, expected)
        error, allowed = apart.relative, TOLERANCE
        wrong = (
            ""
            if apart.agrees(TOLERANCE)
            else f"off by {apart.relative:.3g}, its worst token by {apart.worst_token:.3g}"
        )
    finite = error if error == error and error != float("inf") else -1.0  # which JSON has
    each = everyone([finite, allowed, wrong], here)
    worst = max(each, key=lambda one: one[0] if one[0] >= 0 else float("inf"))
    row.error, row.error_allowed = None if worst[0] < 0 else worst[0], worst[1]
    reasons = [f"rank {rank}: {one[2]}" for rank, one in enumerate(each) if one[2]]
    if reasons:
        row.wrong, row.reason = True, f"wrong result: {reasons[0]}"


def _predict(study: Study, batch: Batch) -> Sequence[Row]:
    """Attention over more ranks than there are: rank 0's shard and merge timed here, communication by the link."""
    here, options = study.here, study.options
    rows = []
    counts = [count for count in dict.fromkeys((here.size, *options.simulate)) if count > 1]
    for count in counts:
        for plan in _plans(options, count):
            if plan.strategy == "one":
                continue
            rows.append(_predicted(study, batch, plan))
            free_memory()
    return rows


def _predicted(study: Study, batch: Batch, plan: Plan) -> Row:
    options = study.options
    row = Row("attention", batch.spec, plan, options.mode, predicted=True)
    same = [
        one for one in study.rows if (one.scope, one.batch, one.plan) == ("attention", batch.spec, plan) and one.median
    ]
    if same and not same[0].predicted:
        row.parts = {name: value for name, value in same[0].parts.items() if name in ("attention", "merge")}
    else:
        _time_parts(study, row, batch)
    if row.reason:
        return row
    sent = traffic(plan, batch, layer=False)
    if sent:
        row.parts["communication"] = sum(study.links[name].seconds(bytes_) for name, bytes_ in sent)
    _add_floor(row, batch, study.links)
    row.median = sum(row.parts.values())
    return row


def _time_parts(study: Study, row: Row, batch: Batch) -> None:
    """What one rank of the row's plan does by itself."""
    here, options = study.here, study.options
    with Clock(here, options.mode, options.l2, options.repeats) as clock:
        job: Attention | None = None
        try:
            job = Attention(batch, row.plan, None)
        except Exception as error:
            row.reason = reason_of(error)
        row.reason = agreed(row.reason, here)
        if row.reason or job is None:
            return
        parts = job.parts()
        row.parts["attention"] = clock.time(clock.capture(parts.attention), part=True).median
        if parts.merge is not None:
            row.parts["merge"] = clock.time(clock.capture(parts.merge), part=True).median


def finish(rows: Sequence[Row], record: dict[str, Any], folder: Path, record_path: Path) -> None:
    """Findings, files beside the record, and where they are."""
    from mlakit.studies.parallel_plot import plot  # which loads Matplotlib, that only the first rank needs

    print("\nFindings:")
    print("\n".join(f"  - {line}" for line in findings(rows)) or "  none")
    if any(row.predicted for row in rows):
        source = "as measured between these ranks" if record["links_measured"] else "as given"
        print(
            "Predictions: attention and merge of one rank's share as measured here, plus latency and bytes over "
            f"bandwidth of the link {source}; no such ranks took part."
        )
    saved = [record_path, folder / "details.csv"]
    write_atomically(saved[1], csv_text(rows))
    for job in groups(rows):
        path = folder / f"{job[0].scope}-{job[0].batch}.png"
        if plot(job, record["ranks"][0]["name"], path):
            saved.append(path)
    names = ", ".join(path.name if path.parent == folder else str(path) for path in saved)
    print(f"saved in {folder}: {names}", file=sys.stderr)


def _nccl(is_cuda: bool) -> dict[str, Any]:
    """Its version, and what the environment tells it otherwise than it would choose."""
    if not is_cuda:
        return {"nccl": None}
    told = {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")}
    told.pop("NCCL_VERSION", None)  # which CUDA's images set, and NCCL does not read
    return {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "nccl_settings": told}
