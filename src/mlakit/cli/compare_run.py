"""What `mlakit compare` does once its flags are read."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlakit.bench import config_file
from mlakit.bench.files import output_file, output_folder
from mlakit.bench.plan import make_plan, planned_dtypes, settings_for
from mlakit.bench.progress import Progress
from mlakit.bench.table import make_console
from mlakit.cli import exit_codes
from mlakit.report import compare_rounds
from mlakit.report.compare import Comparison, compare_records
from mlakit.report.compare_ratio import FEWEST_ROUNDS
from mlakit.report.compare_rounds import ROUNDS, Rounds, Side
from mlakit.report.compare_show import print_comparison, regression_lines, save
from mlakit.report.compare_worktree import checked_out
from mlakit.report.load import load_record, load_records


class _Options:
    """The flags that both ways to compare share.

    Raises:
        ValueError: one of them makes no sense.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.limit = None if args.fail_above is None else parse_percent("--fail-above", args.fail_above)
        self.margin = parse_percent("--same-within", args.same_within)
        self.json: Path | None = args.output_json
        self.csv: Path | None = args.output_csv
        self.quiet: bool = args.quiet
        output_file(self.json, "--output-json")
        output_file(self.csv, "--output-csv")


def of_records(args: argparse.Namespace) -> int:
    """Compare two records; returns the exit code.

    Raises:
        ValueError: bad input of any kind.
    """
    options = _Options(args)
    if len(args.records) != 2:
        raise ValueError(f"expected two records, A and B (or --worktree REV), got {len(args.records)}")
    return _show(compare_records(*load_records(args.records), margin=options.margin), options)


def of_revisions(args: argparse.Namespace, flags: dict[str, Any], command: Sequence[str]) -> int:
    """Measure a revision and the checkout in turn, and compare them; returns the exit code.

    Raises:
        ValueError: bad input of any kind.
        DeviceError: the device does not work with one of the two.
        KeyboardInterrupt: after showing the rows that were done.
    """
    options = _Options(args)
    rounds = ROUNDS if args.rounds is None else args.rounds
    if rounds < FEWEST_ROUNDS:
        raise ValueError(f"--rounds: expected at least {FEWEST_ROUNDS}, as fewer say nothing with 95%, got {rounds}")
    loaded = config_file.load(args.config) if args.config else None
    dtypes = planned_dtypes(loaded, flags)
    wanted = flags.get("benchmark", {}).get("device") or (loaded.content.benchmark.device if loaded else None) or "auto"
    progress = Progress(make_console(stderr=True), quiet=options.quiet)
    with ExitStack() as stack:
        revision = stack.enter_context(checked_out(args.worktree))
        stack.enter_context(progress)
        before = stack.enter_context(Side(revision.name, revision.source, revision.commit))
        after = stack.enter_context(Side("the checkout", compare_rounds.OWN_SOURCE))
        device = after.probe(wanted, dtypes, progress.stage)
        plan = make_plan(settings_for(loaded, flags, cpu=device == "cpu"), device)
        before.probe(device, {row.dtype for row in plan.rows}, progress.stage)
        folder = output_folder(None, "compare", "the records")
        paths = [folder / name for name in ("before.json", "after.json")]
        full_command = ["mlakit", *command]
        records = (before.new_record(full_command, len(plan.rows)), after.new_record(full_command, len(plan.rows)))
        run = Rounds((before, after), records, plan.rows, rounds)
        progress.say(f"A: {revision.name}, {revision.commit} {revision.subject!r}; B: the checkout; {rounds} rounds")
        for note in plan.notes:
            progress.say(f"note: {note}")
        interrupted = False
        try:
            for _ in run.rows(progress):
                for record, path in zip(records, paths, strict=True):
                    record.save(path)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        done = len(records[0].rows)
        left = list(dict.fromkeys(row.batch_spec for row in plan.rows[done:]))
        print(
            f"mlakit: interrupted with {done} of {len(plan.rows)} rows compared; for the others: "
            f"{shlex.join(with_batches(full_command, left))}",
            file=sys.stderr,
        )
        if not done:
            return exit_codes.INTERRUPTED
    ratios = [run.ratios.get(row.config.key) for row in records[0].rows]
    comparison = compare_records(*(load_record(path) for path in paths), margin=options.margin, ratios=ratios)
    if not options.quiet:
        print(f"records: {paths[0]} and {paths[1]}", file=sys.stderr)
    code = _show(comparison, options)
    return exit_codes.INTERRUPTED if interrupted else code


def _show(comparison: Comparison, options: _Options) -> int:
    for line in comparison.warnings:
        print(f"warning: {line}", file=sys.stderr)
    print_comparison(make_console(), comparison)
    save(comparison, options.json, options.csv)
    if not options.quiet:
        for line in comparison.notes:
            print(f"note: {line}", file=sys.stderr)
        saved = [str(path) for path in (options.json, options.csv) if path]
        if saved:
            print(f"saved: {', '.join(saved)}", file=sys.stderr)
    found = [] if options.limit is None else list(regression_lines(comparison, options.limit))
    for line in found:
        print(f"mlakit: regression: {line}", file=sys.stderr)
    return exit_codes.FAILED if found else exit_codes.DONE


def with_batches(command: Sequence[str], specs: Sequence[str]) -> list[str]:
    """A command with other batches in the place of its own."""
    kept: list[str] = []
    skipping = False
    for word in command:
        if word.startswith("-"):
            skipping = word.partition("=")[0] == "--batch-specs"
        if not skipping:
            kept.append(word)
    return [*kept, "--batch-specs", *specs]


def parse_percent(flag: str, text: str) -> float:
    """A percentage as a fraction: "5%" is 0.05.

    Raises:
        ValueError: it is none.
    """
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not text.endswith("%") or not 0 <= value < float("inf"):
        raise ValueError(f"{flag}: expected a percentage such as 5%, got {text!r}")
    return value
