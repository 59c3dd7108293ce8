"""What `mlakit bench` does once its flags are read: plan, probe, run, show, and say where everything is."""

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mlakit.bench import config_file
from mlakit.bench.crossover import find_curves, recommend_thresholds
from mlakit.bench.executor import Executor
from mlakit.bench.files import RUNS, output_file, output_folder, run_folder
from mlakit.bench.formatter import ResultsFormatter
from mlakit.bench.plan import Plan, make_plan, planned_dtypes, settings_for
from mlakit.bench.progress import Progress
from mlakit.bench.record_file import open_record
from mlakit.bench.results import Record
from mlakit.bench.runner import Device, new_session
from mlakit.bench.table import make_console
from mlakit.bench.units import rate
from mlakit.report.load import load_record
from mlakit.report.plots import plot_times


def execute(
    flags: dict[str, Any],
    executor: Executor,
    *,
    config: str | None,
    resume: bool,
    quiet: bool,
    command: Sequence[str],
) -> int:
    """Do the run; returns the exit code.

    Raises:
        ValueError: bad input of any kind.
        KeyboardInterrupt: after saying how to go on.
    """
    loaded = config_file.load(config) if config else None
    err = make_console(stderr=True)
    progress = Progress(err, quiet=quiet)
    wanted = flags.get("benchmark", {}).get("device") or (loaded.content.benchmark.device if loaded else None) or "auto"
    with progress, executor:
        device = executor.probe(wanted, planned_dtypes(loaded, flags), progress)
        plan = make_plan(settings_for(loaded, flags, cpu=device.name == "cpu"), device.name)
        paths = _Paths(plan, resume)
        record = _open_record(plan, device, executor.name, paths, resume, command)
        if not quiet:
            progress.say(_headline(plan, device, executor.describe(device)))
            for note in plan.notes:
                progress.say(f"note: {note}")
        run = executor.run(plan.rows, device, record, lambda r: _save(r, paths), progress)
        already = len(plan.rows) - len(run.missing())
        if already:
            progress.say(f"resuming {paths.json}: {already} of {len(plan.rows)} rows are there")
        progress.expect(len(run.missing()))
        try:
            run.execute()
        except KeyboardInterrupt:
            done = len(plan.rows) - len(run.missing())
            again = shlex.join(["mlakit", *command, *([] if resume else ["--resume"])])
            kept = f"they are in {paths.json}. To go on: {again}" if done else "nothing is saved"
            # With --quiet too: it is what to do now.
            print(f"interrupted with {done} of {len(plan.rows)} rows done; {kept}", file=sys.stderr)
            raise
    return _show(record, plan, paths, err if not quiet else None)


class _Paths:
    """Where a run's files go: as told, else into a folder of the run's own."""

    def __init__(self, plan: Plan, resume: bool) -> None:
        told = {kind: Path(path) for kind, path in plan.output.items() if path}
        for kind, path in told.items():
            output_file(path, f"--output-{kind}")
        if len({path.resolve() for path in told.values()}) < len(told):
            raise ValueError(f"expected a file for each output, got {', '.join(map(str, told.values()))}")
        folder = (_latest(plan) if resume else None) or run_folder(plan.name)
        self.json = told.get("json") or folder / "record.json"
        # Naming any file means: these, and the record that makes resuming possible. Naming none: all of them.
        self.csv = told.get("csv") or (None if told else folder / "results.csv")
        self.plot = told.get("plot") or (None if told else folder / "times.png")


def _latest(plan: Plan) -> Path | None:
    """The folder of the newest run that this plan would go on with: all its rows are rows of the plan."""
    planned = {row.key for row in plan.rows}
    for path in sorted(RUNS.glob(f"{plan.name}-*/record.json"), reverse=True):
        with contextlib.suppress(ValueError):  # no record of this mlakit, or a broken one: not what is looked for
            if {row.config.key for row in Record.load(path).rows} <= planned:
                return path.parent
    return None


def _open_record(
    plan: Plan, device: Device, executor: Literal["local", "ray"], paths: _Paths, resume: bool, command: Sequence[str]
) -> Record:
    if resume and not plan.output.get("json") and not paths.json.exists():
        raise ValueError(f"nothing to resume: no record of {plan.name!r} with these settings in {RUNS}/")
    session = new_session(device, ["mlakit", *command])
    fresh = Record(
        name=plan.name,
        description=plan.description,
        mode=plan.mode,
        planned=len(plan.rows),
        executor=executor,
        sessions=[session],
    )
    output_folder(paths.json.parent, "", "the record")  # before anything is measured that could not be kept
    record = open_record(paths.json, fresh, resume=resume)
    record.planned = len({row.key for row in plan.rows} | {row.config.key for row in record.rows})
    return record


def _save(record: Record, paths: _Paths) -> None:
    record.save(paths.json)
    if paths.csv:
        ResultsFormatter().save_csv(record.rows, paths.csv)


def _headline(plan: Plan, device: Device, on: str) -> str:
    first = plan.rows[0]
    kind = f"MLA ({first.model})" if first.attention == "mla" else "standard attention"
    ceilings = device.ceilings[first.dtype]
    memory = rate(max(ceilings["copy_bytes_per_s"], ceilings["read_bytes_per_s"]), "B/s")
    compute = rate(ceilings["flops_per_s"], "FLOP/s")
    return f"{plan.name}: {kind}, {first.dtype}, on {on}; measured ceilings {memory}, {compute}"


def _show(record: Record, plan: Plan, paths: _Paths, err: Any) -> int:
    keys = {row.key for row in plan.rows}
    rows = [row for row in record.rows if row.config.key in keys]
    out = make_console()
    ResultsFormatter(out).print_table(rows)
    if plan.mode == "decode_vs_prefill":
        out.print()
        curves = find_curves(rows)
        for line in (*curves, *recommend_thresholds(curves)):
            out.print(str(line), soft_wrap=True)
    plotted = paths.plot is not None and plot_times(load_record(paths.json), paths.plot)
    if err is not None:
        places = [("record", paths.json), ("table", paths.csv), ("plot", paths.plot if plotted else None)]
        err.print("saved: " + ", ".join(f"{what} {path}" for what, path in places if path), soft_wrap=True)
        slowed = sorted({reason for row in rows if row.gpu for reason in row.gpu.throttle_reasons})
        if slowed:
            err.print(f"note: the GPU was slowed down while some rows were timed: {', '.join(slowed)}", soft_wrap=True)
    if not any(row.success for row in rows):
        print("mlakit: no row succeeded", file=sys.stderr)
        return 1
    return 0
