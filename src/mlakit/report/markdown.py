"""Tables in Markdown, for a README or a pull request, from any record that mlakit writes. No torch here."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from mlakit.bench.units import percent, three
from mlakit.report.load import LoadedRecord, Measurement, Value

Shown = Literal["time", "host", "limit", "tflops", "bandwidth", "memory"]

_UNITS = (("µs", 1e6, 1e-2), ("ms", 1e3, 10.0), ("s", 1.0, math.inf))  # up to which largest time a unit is taken
_SCALED: dict[str, tuple[str, float, Callable[[Measurement], float | None]]] = {
    "tflops": ("TFLOP/s", 1e-12, lambda row: row.flops / row.seconds if row.flops and row.seconds else None),
    "bandwidth": ("TB/s", 1e-12, lambda row: row.bytes / row.seconds if row.bytes and row.seconds else None),
    "memory": ("MiB", 2.0**-20, lambda row: row.memory_bytes),
    "host": ("µs", 1e6, lambda row: row.host_seconds),
}


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
            "bandwidth" or "memory".
    """

    operations: tuple[str, ...] = ()
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    baseline: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    select: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    value: Shown = "time"


@dataclass(frozen=True)
class _Grid:
    """One operation's jobs (rows) and what each column has there: the fastest of its backends that has a time, else
    one that says why there is none.
    """

    labels: list[str]
    titles: list[str]
    cells: list[list[Measurement | None]]
    baseline: list[str]
    common: str = ""

    def fastest(self, index: int, of_baseline: bool) -> float | None:
        """Seconds of the best column of a row, among those of the baseline or the others."""
        times = [
            cell.seconds
            for title, cell in zip(self.titles, self.cells[index], strict=True)
            if cell is not None and cell.seconds and (title in self.baseline) is of_baseline
        ]
        return min(times, default=None)

    def ratios(self) -> list[float | None]:
        """For each row, how many times as fast as the baseline's best the best of the others is."""
        pairs = [(self.fastest(i, True), self.fastest(i, False)) for i in range(len(self.labels))]
        return [theirs / ours if theirs and ours else None for theirs, ours in pairs]


def markdown_report(records: Sequence[LoadedRecord], options: TableOptions | None = None) -> str:
    """A table for each operation (and model) of each record, jobs as rows and backends as columns; in bold the fastest,
    and what its 95% interval does not tell from the fastest. Below, where and when that was measured.

    Raises:
        ValueError: an operation, column, baseline or selection that no row has; the message names those there are.
    """
    options = options or TableOptions()
    _check(records, options)
    parts: list[tuple[str, str]] = []
    for record in records:
        tables = _tables(record, options)
        if record.crossovers and options.value == "time":
            tables.append(("", "".join(f"- {escape(str(crossover))}\n" for crossover in record.crossovers)))
        if tables:
            shown = tables[-1]
            tables[-1] = (shown[0], f"{shown[1]}\n{_where(record)}")
            name = record.name if len(records) > 1 else ""
            parts += [(", ".join(filter(None, (name, title))), text) for title, text in tables]
    if not parts:
        raise ValueError(f"no row is left by {_given(options)}")
    if len(parts) == 1:
        return parts[0][1]
    return "\n".join(f"**{escape(title)}**\n\n{text}" if title else text for title, text in parts)


def _tables(record: LoadedRecord, options: TableOptions) -> list[tuple[str, str]]:
    """A title and a table for each operation and model."""
    found = []
    for (operation, model), rows in _by_operation(record, options).items():
        grid = _grid(rows, options)
        found.append((", ".join(filter(None, (operation, model))), _table(grid, options.value) + _below(grid)))
    return found


def fractions_of_limit(records: Sequence[LoadedRecord], options: TableOptions) -> dict[str, dict[str, float]]:
    """Column -> job -> the fraction of the limit that a table of the same options would show.

    Raises:
        ValueError: see `markdown_report`; or no row has a limit.
    """
    _check(records, options)
    shown: dict[str, dict[str, float]] = {}
    for record in records:
        for rows in _by_operation(record, options).values():
            grid = _grid(rows, options)
            for label, cells in zip(grid.labels, grid.cells, strict=True):
                for title, cell in zip(grid.titles, cells, strict=True):
                    if cell and cell.fraction_of_limit:
                        shown.setdefault(title, {})[label] = cell.fraction_of_limit
    if not shown:
        raise ValueError(f"no row with a limit is left by {_given(options)}")
    return {title: shown[title] for title in options.columns if title in shown} or shown


def escape(text: str) -> str:
    """A record's words as the content of a cell: nothing in it is taken for Markdown or HTML."""
    for character in "\\`*[]|~":
        text = text.replace(character, "\\" + character)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def _by_operation(record: LoadedRecord, options: TableOptions) -> dict[tuple[str, str], list[Measurement]]:
    found: dict[tuple[str, str], list[Measurement]] = {}
    for row in record.rows:
        wanted = not options.operations or row.operation in options.operations
        named = not options.jobs or any(fnmatchcase(row.job, pattern) for pattern in options.jobs)
        chosen = all(name in row.sizes and row.sizes[name] in values for name, values in options.select.items())
        if wanted and named and chosen:
            found.setdefault((row.operation, row.model), []).append(row)
    return found


def _grid(rows: Sequence[Measurement], options: TableOptions) -> _Grid:
    names = _column_names(rows)
    columns = dict(options.columns) or {name: (name,) for name in dict.fromkeys(names)}
    by_job: dict[str, dict[str, list[Measurement]]] = {}
    for row, name in zip(rows, names, strict=True):
        by_job.setdefault(row.job_key, {}).setdefault(row.backend if options.columns else name, []).append(row)
    jobs = [next(iter(found.values()))[0] for found in by_job.values()]
    cells = [[_best(found, backends) for backends in columns.values()] for found in by_job.values()]
    kept = [i for i, line in enumerate(cells) if any(line)]
    used = [j for j in range(len(columns)) if any(cells[i][j] for i in kept)]
    titles = [title for j, title in enumerate(columns) if j in used]
    labels, common = _labels([jobs[i] for i in kept])
    baseline = [title for title in titles if title in options.baseline]
    return _Grid(labels, titles, [[cells[i][j] for j in used] for i in kept], baseline, common)


def _best(found: Mapping[str, Sequence[Measurement]], backends: Iterable[str]) -> Measurement | None:
    candidates = [row for name in backends for row in found.get(name, ())]
    return min(candidates, key=lambda row: row.seconds or math.inf, default=None)


def _column_names(rows: Sequence[Measurement]) -> list[str]:
    """Backends, with the settings that tell apart what a backend did more than once at one job."""
    settings: dict[str, set[str]] = {}
    seen: dict[tuple[str, str], Measurement] = {}
    for row in rows:
        first = seen.setdefault((row.job_key, row.backend), row)
        differing = {
            key for key in {*row.settings, *first.settings} if row.settings.get(key) != first.settings.get(key)
        }
        settings.setdefault(row.backend, set()).update(differing)
    return [
        row.backend + "".join(f", {key} {row.settings.get(key)}" for key in sorted(settings[row.backend]))
        for row in rows
    ]


def _labels(jobs: Sequence[Measurement]) -> tuple[list[str], str]:
    """Names of the jobs, with the sizes that tell apart those with the same name, and what all names have in common."""
    telling: dict[str, set[str]] = {}
    first: dict[str, Measurement] = {}
    for job in jobs:
        other = first.setdefault(job.job, job)
        differing = {key for key in {*job.sizes, *other.sizes} if job.sizes.get(key) != other.sizes.get(key)}
        telling.setdefault(job.job, set()).update(differing)
    parts = [
        [*job.job.split(", "), *(f"{key} {job.sizes.get(key)}" for key in sorted(telling[job.job]))] for job in jobs
    ]
    common = [part for part in parts[0] if all(part in other for other in parts)] if len(parts) > 1 else []
    return [", ".join(part for part in named if part not in common) for named in parts], ", ".join(common)


def _table(grid: _Grid, value: Shown) -> str:
    unit, show = _formatter([cell for line in grid.cells for cell in line if cell], value)
    ratios = grid.ratios() if grid.baseline else []
    header = [unit, *map(escape, grid.titles)] + (["times the speed"] if ratios else [])
    lines = [header, ["--"] + ["--:"] * (len(header) - 1)]
    for index, (label, cells) in enumerate(zip(grid.labels, grid.cells, strict=True)):
        texts = [_cell(cell, show, _among_the_fastest(cell, cells)) if cell else "" for cell in cells]
        ratio = [f"{ratios[index]:.2f}" if ratios[index] else ""] if ratios else []
        lines.append([escape(label), *texts, *ratio])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _among_the_fastest(cell: Measurement, cells: Sequence[Measurement | None]) -> bool:
    """Whether it is the fastest of several, or its interval overlaps with the fastest's."""
    timed = [other for other in cells if other and other.seconds]
    if not cell.seconds or len(timed) < 2:
        return False
    best = min(timed, key=lambda row: row.seconds or math.inf)
    return cell is best or bool(cell.interval and best.interval and cell.interval[0] <= best.interval[1])


def _cell(row: Measurement, show: Callable[[Measurement], str], best: bool) -> str:
    text = show(row)
    if row.status != "ok" or not text:
        return escape(row.status_words) if row.status != "ok" else ""
    return f"**{text}**" if best else text


def _formatter(rows: Sequence[Measurement], value: Shown) -> tuple[str, Callable[[Measurement], str]]:
    """The unit of a whole table, and a cell's text in it."""
    if value == "limit":
        return "of the limit", lambda row: percent(row.fraction_of_limit) if row.fraction_of_limit else ""
    if value == "time":
        largest = max((row.seconds for row in rows if row.seconds), default=0.0)
        unit, factor = next((unit, factor) for unit, factor, limit in _UNITS if largest < limit)
        return unit, lambda row: three(row.seconds * factor) if row.seconds else ""
    unit, factor, figure = _SCALED[value]

    def scaled(row: Measurement) -> str:
        found = figure(row)
        return "" if found is None else three(found * factor)

    return unit, scaled


def _below(grid: _Grid) -> str:
    """What all jobs have in common, and what the ratios come to."""
    lines = [f"All: {grid.common}."] if grid.common else []
    ratios = [ratio for ratio in grid.ratios() if ratio]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        ours = [title for title in grid.titles if title not in grid.baseline]
        lines.append(
            f"{_of(ours)} beside {_of(grid.baseline)}: {min(ratios):.2f} to {max(ratios):.2f} times as fast, "
            f"{mean:.2f} in the geometric mean of {len(ratios)}."
        )
    return "".join(f"\n{escape(line)}\n" for line in lines)


def _where(record: LoadedRecord) -> str:
    """Where and when a record's rows were measured."""
    lines = []
    for session in record.sessions:
        made = session.environment
        versions = [f"{name} {made[name]}" for name in ("torch", "triton") if made.get(name)]
        lines.append(", ".join(filter(None, (session.device, *versions, (session.started or "")[:10]))) + ".")
    return "\n".join(f"{escape(line)}\n" for line in dict.fromkeys(lines))


def _of(titles: Sequence[str]) -> str:
    return titles[0] if len(titles) == 1 else f"the fastest of {', '.join(titles)}"


def _check(records: Sequence[LoadedRecord], options: TableOptions) -> None:
    rows = [row for record in records for row in record.rows]
    _known("operation", options.operations, [row.operation for row in rows])
    rows = [row for row in rows if not options.operations or row.operation in options.operations]
    backends = [row.backend for row in rows]
    _known("backend", [name for names in options.columns.values() for name in names], backends)
    _known("column as baseline", options.baseline, list(options.columns) or backends)
    _known("size", options.select, [name for row in rows for name in row.sizes])


def _known(what: str, wanted: Iterable[str], there: Sequence[str]) -> None:
    for name in wanted:
        if name not in there:
            raise ValueError(f"no {what} {name!r}; there are: {', '.join(sorted(set(there)))}")


def _given(options: TableOptions) -> str:
    parts = {"operation": options.operations, "jobs": options.jobs, "select": dict(options.select)}
    return ", ".join(f"{name} {given!r}" for name, given in parts.items() if given) or "a record without rows"
