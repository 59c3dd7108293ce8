"""PNG plots of records: times, speed-ups, fractions of the limit, memory, sweeps, rooflines."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlakit.report import style
from mlakit.report.load import LoadedRecord, Measurement
from mlakit.report.plot_curves import draw_curves, draw_roofline
from mlakit.report.rows import Entry, entries_of, job_titles

# Of one picture: more would be too small to read, or too tall to look at.
_MOST_DOTS = 90

Value = tuple[float, float | None, float | None]  # with the ends of its interval, where it has one


@dataclass
class Dots:
    """A picture with a line for each job and a dot for each backend on it."""

    title: str
    unit: str
    jobs: list[str] = field(default_factory=list)
    values: dict[str, dict[int, Value]] = field(default_factory=dict)  # by backend, then by the job's number
    limits: dict[int, float] = field(default_factory=dict)
    log: bool = True
    line: float | None = None  # what all are to be compared with


def write_plots(records: Sequence[LoadedRecord], folder: Path, *, baseline: str | None = None) -> list[Path]:
    """Write a PNG for each operation of each record and each question that its rows answer; returns their paths.

    Args:
        records: what to show.
        folder: where to write, made if need be: RECORD-OPERATION-times.png, -speed-up, -limit, -memory, -sweep-SIZE and
            -roofline. Many jobs take several files, with a number at the end.
        baseline: whose time speed-ups refer to; None: there are none.

    Raises:
        ValueError: no row has a time, or none is the baseline's.
    """
    if not any(row.seconds for record in records for row in record.rows):
        raise ValueError(f"nothing to plot: no row of {', '.join(str(record.path) for record in records)} has a time")
    entries = [entries_of([record]) for record in records]
    names = {entry.label for mine in entries for entry in mine}
    if baseline is not None and baseline not in names:
        raise ValueError(f"--baseline: no row of {baseline!r}; the records have: {', '.join(sorted(names))}")
    written: list[Path] = []
    taken: dict[str, int] = {}
    for record, mine in zip(records, entries, strict=True):
        for operation in dict.fromkeys(entry.row.operation for entry in mine):
            stem = _slug(f"{record.name}-{operation}")
            taken[stem] = taken.get(stem, 0) + 1  # two records may have one name
            stem = stem if taken[stem] == 1 else f"{stem}-{taken[stem]}"
            written += _operation([e for e in mine if e.row.operation == operation], folder, stem, baseline)
    return written


def plot_times(record: LoadedRecord, path: Path) -> bool:
    """Write the times of a run's record by batch and backend, with the limit of each batch.

    Returns:
        False, and no file, if no row has a time.
    """
    entries = entries_of([record])
    if not any(entry.row.seconds for entry in entries):
        return False
    pages = list(_pages(_times(_jobs(entries), _title(entries, "time of a call"))))
    left_out = sum(len(page.jobs) for page in pages[1:])
    if left_out:
        pages[0].title += f"\n{left_out} more batches in the table (mlakit report RECORD --plot DIR draws all)"
    draw(pages[0], path)
    return True


def _operation(entries: Sequence[Entry], folder: Path, stem: str, baseline: str | None) -> Iterator[Path]:
    jobs = _jobs(entries)
    pictures = [
        ("times", _times(jobs, _title(entries, "time of a call"))),
        ("limit", _dots(jobs, _title(entries, "part of what the device can do"), "% of the limit", _of_limit)),
        ("memory", _dots(jobs, _title(entries, "memory of a call beside its inputs"), "MiB", _memory)),
    ]
    if baseline is not None:
        pictures.insert(1, ("speed-up", _speedups(jobs, _title(entries, f"times as fast as {baseline}"), baseline)))
    for kind, dots in pictures:
        dots.log = kind != "limit"
        pages = list(_pages(dots))
        for number, page in enumerate(pages, start=1):
            path = folder / (f"{stem}-{kind}.png" if len(pages) == 1 else f"{stem}-{kind}-{number}.png")
            draw(page, path)
            yield path
    yield from draw_curves(entries, folder, stem, lambda what: _title(entries, what))
    roofline = folder / f"{stem}-roofline.png"
    if draw_roofline(entries, _title(entries, "operations a second by operations a byte"), roofline):
        yield roofline


def _jobs(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """Entries of the same job together, with its title; without those that have no time at all."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.job, []).append(entry)
    jobs = [mine for mine in found.values() if any(entry.row.seconds for entry in mine)]
    return list(zip(_shortened(job_titles(jobs)), jobs, strict=True))


def _shortened(names: Sequence[str]) -> list[str]:
    """Names without what all of them say: "batch 32, heads 128" and "batch 64, heads 128" differ in their batch."""
    parts = [name.split(", ") for name in names]
    common = set(parts[0]).intersection(*parts[1:]) if len(parts) > 1 else set()
    return [
        ", ".join(part for part in mine if part not in common) or name for mine, name in zip(parts, names, strict=True)
    ]


def _times(jobs: Sequence[tuple[str, list[Entry]]], title: str) -> Dots:
    unit, factor = style.time_unit([e.row.seconds for _, mine in jobs for e in mine if e.row.seconds])

    def value(row: Measurement) -> Value | None:
        low, high = row.interval or (None, None)
        return (row.seconds * factor, low and low * factor, high and high * factor) if row.seconds else None

    dots = _dots(jobs, title, unit, value)
    for i, (_, mine) in enumerate(jobs):
        if limits := [entry.row.limit_seconds for entry in mine if entry.row.limit_seconds]:
            dots.limits[i] = min(limits) * factor
    return dots


def _of_limit(row: Measurement) -> Value | None:
    return (100 * row.fraction_of_limit, None, None) if row.fraction_of_limit else None


def _memory(row: Measurement) -> Value | None:
    return (row.memory_bytes / 2**20, None, None) if row.memory_bytes and row.seconds else None


def _speedups(jobs: Sequence[tuple[str, list[Entry]]], title: str, baseline: str) -> Dots:
    known = [(name, mine) for name, mine in jobs if any(e.label == baseline and e.row.seconds for e in mine)]
    dots = Dots(title, "times as fast (to the right is faster)", [name for name, _ in known], line=1.0)
    for i, (_, mine) in enumerate(known):
        base = next(entry.row.seconds for entry in mine if entry.label == baseline and entry.row.seconds)
        for entry in mine:
            if entry.row.seconds:
                dots.values.setdefault(entry.label, {})[i] = (base / entry.row.seconds, None, None)
    return dots


def _dots(
    jobs: Sequence[tuple[str, list[Entry]]], title: str, unit: str, value: Callable[[Measurement], Value | None]
) -> Dots:
    dots = Dots(title, unit, [name for name, _ in jobs])
    for i, (_, mine) in enumerate(jobs):
        for entry in mine:
            if (found := value(entry.row)) is not None:
                dots.values.setdefault(entry.label, {})[i] = found
    return dots


def _pages(dots: Dots) -> Iterator[Dots]:
    """Pictures that are not too full, of jobs that have a dot; backends keep their looks on all of them."""
    drawn = sorted({i for mine in dots.values.values() for i in mine})
    size = max(1, _MOST_DOTS // max(len(dots.values), 1))
    for start in range(0, len(drawn), size):
        chosen = {job: i for i, job in enumerate(drawn[start : start + size])}
        yield Dots(
            dots.title,
            dots.unit,
            [dots.jobs[job] for job in chosen],
            {name: {chosen[i]: v for i, v in mine.items() if i in chosen} for name, mine in dots.values.items()},
            {chosen[i]: limit for i, limit in dots.limits.items() if i in chosen},
            dots.log,
            dots.line,
        )


def draw(dots: Dots, path: Path) -> None:
    """Write one picture: jobs from top to bottom, the dots of a job's backends below one another, so that none hides
    another.
    """
    lane = 0.13 * max(len(dots.values), 2) + 0.1  # inches of a job
    width = 9.0
    figure = style.new_figure(width, 1.6 + lane * len(dots.jobs) + 0.2 * (len(dots.values) // 4), dots.title)
    axes = figure.add_subplot()
    handles: dict[str, Any] = {}
    step = 0.8 / max(len(dots.values), 1)
    for index, (name, mine) in enumerate(dots.values.items()):
        if not mine:
            continue
        y = [job - 0.4 + step * (index + 0.5) for job in mine]
        x = [value for value, _, _ in mine.values()]
        errors = [[v - (v if end is None else end) for v, end, _ in mine.values()],
                  [(v if end is None else end) - v for v, _, end in mine.values()]]  # fmt: skip
        look = {"marker": style.marker(index), "markersize": 5, "color": style.colour(index), "linestyle": ""}
        axes.errorbar(
            x, y, xerr=[[max(e, 0.0) for e in side] for side in errors], ecolor="#444444", elinewidth=1, capsize=2,
            **look,
        )  # fmt: skip
        (handles[name],) = axes.plot([], [], **look)  # for the legend: without the interval's ends
    if dots.limits:
        look = {"color": "#000000", "linestyle": "", "marker": "|", "markeredgewidth": 1.4}
        axes.plot(list(dots.limits.values()), list(dots.limits), markersize=0.8 * lane * 72, **look)
        (handles["least possible (measured ceilings)"],) = axes.plot([], [], markersize=9, **look)
    if dots.line is not None:
        axes.axvline(dots.line, color="#000000", linewidth=1)
    if dots.log:
        style.log_axis(axes.xaxis, [v for mine in dots.values.values() for v, _, _ in mine.values()])
    else:
        axes.set_xlim(0, None)
    axes.set_xlabel(f"{dots.unit} (log scale)" if dots.log else dots.unit)
    style.tidy(axes, grid="x")
    axes.set_yticks(range(len(dots.jobs)), [job if len(job) <= 56 else f"{job[:55]}…" for job in dots.jobs])
    for between in range(len(dots.jobs) - 1):
        axes.axhline(between + 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_ylim(len(dots.jobs) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    style.legend(figure, handles, width)
    style.save(figure, path)


def _title(entries: Sequence[Entry], what: str) -> str:
    first = entries[0]
    models = dict.fromkeys(e.row.model for e in entries if e.row.model)
    dtypes = dict.fromkeys(str(e.row.sizes["dtype"]) for e in entries if e.row.sizes.get("dtype"))
    caches = dict.fromkeys(f"{e.row.sizes['l2']} cache" for e in entries if e.row.sizes.get("l2"))
    heads = {e.row.sizes.get("heads") for e in entries}
    facts = [first.row.operation, *models, *dtypes, *caches]
    if len(heads) == 1 and None not in heads:
        facts.insert(1 + len(models), f"{heads.pop()} heads")
    return f"{first.record.name}: {what}\n{', '.join(facts)}, on {first.session.device}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
