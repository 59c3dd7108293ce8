"""Tables in Markdown, for a README or a pull request, from any record that mlakit writes. No torch here."""

import math
from collections.abc import Callable, Sequence

from mlakit.bench.units import percent, three
from mlakit.report.grid import Grid, Shown, TableOptions, check_options, given, grids
from mlakit.report.load import LoadedRecord, Measurement

_UNITS = (("µs", 1e6, 1e-2), ("ms", 1e3, 10.0), ("s", 1.0, math.inf))  # up to which largest time a unit is taken
_SCALED: dict[str, tuple[str, float, Callable[[Measurement], float | None]]] = {
    "tflops": ("TFLOP/s", 1e-12, lambda row: row.flops / row.seconds if row.flops and row.seconds else None),
    "bandwidth": ("TB/s", 1e-12, lambda row: row.bytes / row.seconds if row.bytes and row.seconds else None),
    "memory": ("MiB", 2.0**-20, lambda row: row.memory_bytes),
    "host": ("µs", 1e6, lambda row: row.host_seconds),
}


def markdown_report(records: Sequence[LoadedRecord], options: TableOptions | None = None) -> str:
    """A table for each operation (and model) of each record, jobs as rows and backends as columns; in bold the fastest,
    and what its 95% interval does not tell from the fastest. Below, where and when that was measured.

    Raises:
        ValueError: an operation, column, baseline or selection that no row has; the message names those there are.
    """
    options = options or TableOptions()
    check_options(records, options)
    parts: list[tuple[str, str]] = []
    for record in records:
        of_it = {} if options.value == "conclusions" else grids(record, options)
        tables = [
            (", ".join(filter(None, title)), _table(grid, options.value) + _below(grid))
            for title, grid in of_it.items()
        ]
        if options == TableOptions():
            tables += _differences(record)
        if options in (TableOptions(), TableOptions(value="conclusions")) and record.conclusions:
            tables.append(("", "".join(f"- {escape(words)}\n" for words in record.conclusions)))
        if tables:
            title, text = tables[-1]
            tables[-1] = (title, f"{text}\n{_where(record, [row for grid in of_it.values() for row in grid.shown()])}")
            name = record.name if len(records) > 1 else ""
            parts += [(", ".join(filter(None, (name, title))), text) for title, text in tables]
    if not parts:
        nothing = (
            "no record has conclusions" if options.value == "conclusions" else f"no row is left by {given(options)}"
        )
        raise ValueError(nothing)
    if len(parts) == 1:
        return parts[0][1]
    return "\n".join(f"**{escape(title)}**\n\n{text}" if title else text for title, text in parts)


def _differences(record: LoadedRecord) -> list[tuple[str, str]]:
    """How far results were from one another at most, pair by pair."""
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for found in record.differences:
        pair = worst.setdefault((found["first"], found["second"]), {})
        if found["relative"] is not None:
            pair[found["phase"]] = max(found["relative"], pair.get(found["phase"], 0.0))
    phases = list(dict.fromkeys(phase for pair in worst.values() for phase in pair))
    lines = [["", *phases], ["--"] + ["--:"] * len(phases)]
    for names, pair in worst.items():
        cells = [f"{pair[phase]:.1e}" if phase in pair else "" for phase in phases]
        lines.append([escape(" and ".join(names)), *cells])
    return [("largest relative difference", _lines(lines))] if phases else []


def escape(text: str) -> str:
    """A record's words as the content of a cell: nothing in it is taken for Markdown or HTML."""
    for character in "\\`*[]|~":
        text = text.replace(character, "\\" + character)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def _table(grid: Grid, value: Shown) -> str:
    unit, show = _formatter(grid.shown(), value)
    ratios = grid.ratios() if grid.baseline else []
    marked = value not in ("host", "memory")  # which say nothing of speed
    header = [unit, *map(escape, grid.titles)] + (["times the speed"] if ratios else [])
    lines = [header, ["--"] + ["--:"] * (len(header) - 1)]
    for index, (label, cells) in enumerate(zip(grid.labels, grid.cells, strict=True)):
        texts = [_cell(cell, show, marked and _among_the_fastest(cell, cells)) if cell else "" for cell in cells]
        ratio = [_ratio(ratios[index])] if ratios else []
        lines.append([escape(label), *texts, *ratio])
    return _lines(lines)


def _lines(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _among_the_fastest(cell: Measurement, cells: Sequence[Measurement | None]) -> bool:
    """Whether it is the fastest of several, or neither its interval nor three digits tell it from the fastest."""
    timed = [(other.seconds, other.interval) for other in cells if other and other.seconds and not other.predicted]
    if not cell.seconds or cell.predicted or len(timed) < 2:
        return False
    seconds, interval = min(timed, key=lambda found: found[0])
    overlap = bool(cell.interval and interval and cell.interval[0] <= interval[1])
    return overlap or three(cell.seconds) == three(seconds)


def _cell(row: Measurement, show: Callable[[Measurement], str], best: bool) -> str:
    if row.status != "ok":
        return escape(row.status_words)
    text = show(row) + (" (unchecked)" if row.checked is False else "")
    return f"**{text}**" if best and text else text


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


def _below(grid: Grid) -> str:
    """What all jobs have in common, and what the ratios come to."""
    lines = [f"All: {grid.common}."] if grid.common else []
    ratios = [ratio for ratio in grid.ratios() if ratio]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        others = [title for title in grid.titles if title not in grid.baseline]
        ours = others[0] if len(others) == 1 else "The fastest other column"
        theirs = grid.baseline[0] if len(grid.baseline) == 1 else f"the fastest of {', '.join(grid.baseline)}"
        lines.append(
            f"{ours} has {_ratio(min(ratios))} to {_ratio(max(ratios))} times the speed of {theirs}; "
            f"geometric mean {_ratio(mean)}."
        )
    return "".join(f"\n{escape(line)}\n" for line in lines)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _where(record: LoadedRecord, shown: Sequence[Measurement]) -> str:
    """What to know about the rows shown, and where and when they were measured."""
    lines = []
    if not record.complete:
        count = f"{len(record.rows)} of {record.planned} rows are" if record.planned else "not all rows were"
        lines.append(f"Not complete: {count} measured.")
    slowed = [row for row in shown if row.throttled]
    if slowed:
        reasons = ", ".join(sorted({reason for row in slowed for reason in row.throttled}))
        lines.append(f"The GPU was slowed down while {len(slowed)} of {len(shown)} were timed: {reasons}.")
    sessions = sorted({row.session for row in shown}) or range(len(record.sessions))
    for session in (record.sessions[number] for number in sessions):
        made = session.environment
        versions = [f"{name} {made[name]}" for name in ("torch", "triton") if made.get(name)]
        lines.append(", ".join(filter(None, (session.device, *versions, (session.started or "")[:10]))) + ".")
    return "\n".join(f"{escape(line)}\n" for line in dict.fromkeys(lines))
