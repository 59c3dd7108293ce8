"""Which of a record's rows stand where: jobs as rows, backends as columns, for tables and plots. No torch here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from mlakit.report.load import LoadedRecord, Measurement, Value

Shown = Literal["time", "host", "limit", "tflops", "bandwidth", "memory", "conclusions"]


@dataclass(frozen=True)
class TableOptions:
    """What a table shows.

    Attributes:
        operations: which of a record's operations; all if empty.
        columns: a column's title -> backends, of which the fastest is shown; every backend under its own name if empty.
        baseline: titles of columns (without `columns`, backends) that the fastest of the others is compared with, in a
            column and in a sentence below the table.
        jobs: patterns as of file names; rows whose job matches one of them. All if empty.
        select: sizes ("dtype", "heads") -> the value, or one of the values, that rows have.
        value: "time", "host" (the time a call takes of its thread), "limit" (fraction of the limit), "tflops",
            "bandwidth" or "memory"; "conclusions" is no table but what follows in words.
    """

    operations: tuple[str, ...] = ()
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    baseline: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    select: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    value: Shown = "time"


@dataclass(frozen=True)
class Grid:
    """One operation's jobs (rows) and what each column has there: the fastest of its backends that has a time, else
    one that says why there is none.
    """

    labels: list[str]
    titles: list[str]
    cells: list[list[Measurement | None]]
    baseline: list[str]
    common: str = ""

    def shown(self) -> list[Measurement]:
        """All cells that there are."""
        return [cell for line in self.cells for cell in line if cell]

    def fastest(self, index: int, of_baseline: bool) -> float | None:
        """Seconds of the best column of a row, among those of the baseline or the others."""
        times = [
            cell.seconds
            for title, cell in zip(self.titles, self.cells[index], strict=True)
            if cell and cell.seconds and not cell.predicted and (title in self.baseline) is of_baseline
        ]
        return min(times, default=None)

    def ratios(self) -> list[float | None]:
        """For each row, how many times as fast as the baseline's best the best of the others is."""
        pairs = [(self.fastest(i, True), self.fastest(i, False)) for i in range(len(self.labels))]
        return [theirs / ours if theirs and ours else None for theirs, ours in pairs]


def grids(record: LoadedRecord, options: TableOptions) -> dict[tuple[str, str], Grid]:
    """(operation, model) -> a grid of the rows that are asked for; empty if there is none."""
    return {key: _grid(rows, options) for key, rows in _by_operation(record, options).items()}


def fractions_of_limit(records: Sequence[LoadedRecord], options: TableOptions) -> dict[str, dict[str, float]]:
    """Column -> job -> the fraction of the limit that a table of the same options would show.

    Raises:
        ValueError: see `markdown_report`; or no row has a limit.
    """
    check_options(records, options)
    shown: dict[str, dict[str, float]] = {}
    for record in records:
        for grid in grids(record, options).values():
            for label, cells in zip(grid.labels, grid.cells, strict=True):
                for title, cell in zip(grid.titles, cells, strict=True):
                    if cell and cell.fraction_of_limit:
                        shown.setdefault(title, {})[label] = cell.fraction_of_limit
    if not shown:
        raise ValueError(f"no row with a limit is left by {given(options)}")
    return {title: shown[title] for title in options.columns if title in shown} or shown


def _by_operation(record: LoadedRecord, options: TableOptions) -> dict[tuple[str, str], list[Measurement]]:
    found: dict[tuple[str, str], list[Measurement]] = {}
    for row in record.rows:
        wanted = not options.operations or row.operation in options.operations
        named = not options.jobs or any(fnmatchcase(row.job, pattern) for pattern in options.jobs)
        chosen = all(name in row.sizes and row.sizes[name] in values for name, values in options.select.items())
        if wanted and named and chosen:
            found.setdefault((row.operation, row.model), []).append(row)
    return found


def _grid(rows: Sequence[Measurement], options: TableOptions) -> Grid:
    names = _column_names(rows)
    columns = dict(options.columns) or {name: (name,) for name in dict.fromkeys(names)}
    by_job: dict[tuple[str, str], dict[str, list[Measurement]]] = {}
    for row, name in zip(rows, names, strict=True):
        by_job.setdefault(row.comparison, {}).setdefault(row.backend if options.columns else name, []).append(row)
    jobs = [next(iter(found.values()))[0] for found in by_job.values()]
    cells = [[_best(found, backends) for backends in columns.values()] for found in by_job.values()]
    kept = [i for i, line in enumerate(cells) if any(line)]
    used = [j for j in range(len(columns)) if any(cells[i][j] for i in kept)]
    titles = [title for j, title in enumerate(columns) if j in used]
    labels, common = _labels([jobs[i] for i in kept])
    baseline = [title for title in titles if title in options.baseline]
    return Grid(labels, titles, [[cells[i][j] for j in used] for i in kept], baseline, common)


def _best(found: Mapping[str, Sequence[Measurement]], backends: Iterable[str]) -> Measurement | None:
    candidates = [row for name in backends for row in found.get(name, ())]
    return min(candidates, key=lambda row: row.seconds or math.inf, default=None)


def _column_names(rows: Sequence[Measurement]) -> list[str]:
    """Backends, with the settings that tell apart what a backend did more than once at one job."""
    settings: dict[str, set[str]] = {}
    seen: dict[tuple[tuple[str, str], str], Measurement] = {}
    for row in rows:
        first = seen.setdefault((row.comparison, row.backend), row)
        differing = {
            key for key in {*row.settings, *first.settings} if row.settings.get(key) != first.settings.get(key)
        }
        settings.setdefault(row.backend, set()).update(differing)
    return [
        row.backend + "".join(f", {key} {row.settings.get(key)}" for key in sorted(settings[row.backend]))
        for row in rows
    ]


def _labels(jobs: Sequence[Measurement]) -> tuple[list[str], str]:
    """Names of the jobs, with the sizes and GPUs that tell apart those with the same name, and what all names have in
    common.
    """
    traits = [{**job.sizes, "on": job.place} for job in jobs]
    telling: dict[str, set[str]] = {}
    first: dict[str, Mapping[str, Value]] = {}
    for job, mine in zip(jobs, traits, strict=True):
        other = first.setdefault(job.job, mine)
        differing = {key for key in {*mine, *other} if mine.get(key) != other.get(key)}
        telling.setdefault(job.job, set()).update(differing)
    parts = [
        [*job.job.split(", "), *(f"{key} {mine.get(key)}" for key in sorted(telling[job.job]))]
        for job, mine in zip(jobs, traits, strict=True)
    ]
    common = [part for part in parts[0] if all(part in other for other in parts)] if len(parts) > 1 else []
    if any(set(named) <= set(common) for named in parts):
        common = []  # something must be left of each name
    return [", ".join(part for part in named if part not in common) for named in parts], ", ".join(common)


def check_options(records: Sequence[LoadedRecord], options: TableOptions) -> None:
    """Raise ValueError where options name an operation, backend, column or size that is in no record."""
    rows = [row for record in records for row in record.rows]
    _known("operation", options.operations, [row.operation for row in rows])
    rows = [row for row in rows if not options.operations or row.operation in options.operations]
    _known("backend", [name for names in options.columns.values() for name in names], [row.backend for row in rows])
    _known("size", options.select, [name for row in rows for name in row.sizes])
    found = [_by_operation(record, options).values() for record in records]
    columns = list(options.columns) or [name for by in found for rows in by for name in _column_names(rows)]
    _known("column for the baseline", options.baseline, columns)


def _known(what: str, wanted: Iterable[str], there: Sequence[str]) -> None:
    for name in wanted:
        if name not in there:
            raise ValueError(f"no {what} {name!r}; there are: {', '.join(sorted(set(there)))}")


def given(options: TableOptions) -> str:
    """What options choose rows by, in words."""
    parts = {"operation": options.operations, "jobs": options.jobs, "select": dict(options.select)}
    return ", ".join(f"{name} {value!r}" for name, value in parts.items() if value) or "a record without rows"
