"""A comparison as a table for people, as JSON and as CSV. No torch here."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlakit.bench.columns import fit
from mlakit.bench.files import write_atomically
from mlakit.bench.units import percent, seconds, three
from mlakit.report.compare import OUTCOMES, Comparison, Outcome, Pair, label_of
from mlakit.report.load import LoadedRecord, Measurement

SCHEMA = "mlakit.compare/1"

_STYLES: dict[Outcome, str] = {
    "SLOWER": "bold red", "LOST": "bold red", "FASTER": "bold green", "GAINED": "green", "SAME": "",
    "UNSURE": "yellow", "NO TIME": "dim",
}  # fmt: skip
_WORDS: dict[Outcome, str] = {
    "SLOWER": "slower", "LOST": "lost their time", "FASTER": "faster", "GAINED": "gained one", "SAME": "the same",
    "UNSURE": "unsure", "NO TIME": "without a time on either side",
}  # fmt: skip
# Title, which goes first when room is short (0: never), and whether it is set to the right.
_COLUMNS = (
    ("job", 0, False), ("backend", 0, False), ("A", 2, True), ("B", 2, True), ("B/A", 0, True),
    ("95% interval", 1, True), ("", 0, False),
)  # fmt: skip


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print both sides, a table of the pairs, what one side alone has, and the count of each outcome."""
    for name, record in (("A", comparison.a), ("B", comparison.b)):
        console.print(Text(f"{name}: {_describe(record)}"), soft_wrap=True)
    rows = [pair.before for pair in comparison.pairs]
    several = len({row.operation for row in rows}) > 1
    lines = [_cells(pair, rows, several) for pair in comparison.pairs]
    widths = [max(len(title), *(len(line[i]) for line in lines)) for i, (title, _, _) in enumerate(_COLUMNS)]
    kept = fit(widths, [keep for _, keep, _ in _COLUMNS], console.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i in kept:
        title, _, right = _COLUMNS[i]
        table.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=right)
    job = ""
    for pair, line in zip(comparison.pairs, lines, strict=True):
        cells = ["" if line[0] == job else line[0], *line[1:]]
        job = line[0]
        table.add_row(*[Text(cells[i], style=_STYLES[pair.outcome]) for i in kept])
    console.print(table)
    if len(kept) < len(_COLUMNS):
        left_out = ", ".join(title for i, (title, _, _) in enumerate(_COLUMNS) if i not in kept)
        console.print(Text(f"(left out for want of room: {left_out})", style="dim"))
    for pair in comparison.pairs:
        if pair.outcome in ("LOST", "GAINED"):
            console.print(Text(_why(pair, rows), style=_STYLES[pair.outcome]), soft_wrap=not console.is_terminal)
    for name, alone in (("A", comparison.only_a), ("B", comparison.only_b)):
        for told in _alone(alone):
            console.print(Text(f"only in {name}: {told}"), soft_wrap=not console.is_terminal)
    console.print(Text(summary(comparison)), soft_wrap=True)


def summary(comparison: Comparison) -> str:
    """How many pairs came out how, and the mean of their ratios."""
    counts = [f"{n} {_WORDS[outcome]}" for outcome in OUTCOMES if (n := comparison.counts[outcome])]
    ratios = [pair.ratio.value for pair in comparison.pairs if pair.ratio]
    mean = ""
    if ratios:
        times = _number(math.exp(math.fsum(map(math.log, ratios)) / len(ratios)))
        mean = f"; B takes {times} times as long as A (geometric mean)"
    total = len(comparison.pairs)
    within = f", differences below {percent(comparison.margin)} count as none" if comparison.counts["SAME"] else ""
    return f"{total} {'pair' if total == 1 else 'pairs'}: {', '.join(counts)}{within}{mean}"


def regression_lines(comparison: Comparison, limit: float) -> Iterator[str]:
    """A line for each row that B is worse at by more than `limit`."""
    rows = [pair.before for pair in comparison.pairs]
    for pair in comparison.regressions(limit):
        if pair.ratio is None or pair.ratio.low is None:
            yield _why(pair, rows)
        else:
            more, least = percent(pair.ratio.value - 1), percent(pair.ratio.low - 1)
            yield f"{label_of(pair.before, rows)}, {pair.before.backend}: takes {more} longer, {least} at least"


def save(comparison: Comparison, json_path: Path | None, csv_path: Path | None) -> None:
    """Write the files that are wanted, each in one step."""
    if json_path is not None:
        write_atomically(json_path, json.dumps(as_json(comparison), indent=1, allow_nan=False) + "\n")
    if csv_path is not None:
        write_atomically(csv_path, csv_text(comparison))


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Plain values, seconds."""
    return {
        "schema": SCHEMA,
        "a": _side(comparison.a),
        "b": _side(comparison.b),
        "same_within": comparison.margin,
        "warnings": list(comparison.warnings),
        "notes": list(comparison.notes),
        "counts": {outcome: comparison.counts[outcome] for outcome in OUTCOMES},
        "pairs": [
            {
                **_what(pair.before),
                "outcome": pair.outcome,
                "ratio": pair.ratio.value if pair.ratio else None,
                "interval": [pair.ratio.low, pair.ratio.high] if pair.ratio and pair.ratio.low is not None else None,
                "basis": pair.ratio.basis if pair.ratio else None,
                "a": _measured(pair.before),
                "b": _measured(pair.after),
            }
            for pair in comparison.pairs
        ],
        "only_a": [{**_what(row), **_measured(row)} for row in comparison.only_a],
        "only_b": [{**_what(row), **_measured(row)} for row in comparison.only_b],
    }


_CSV_COLUMNS = (
    "operation", "job", "backend", "model", "outcome", "ratio", "ratio_low", "ratio_high", "basis",
    "a_seconds", "a_low", "a_high", "a_samples", "a_status", "b_seconds", "b_low", "b_high", "b_samples", "b_status",
)  # fmt: skip


def csv_text(comparison: Comparison) -> str:
    """A line a pair, then those of one side; sizes and settings in columns of their own, behind the figures."""
    lines: list[dict[str, Any]] = []
    for pair in comparison.pairs:
        found: dict[str, Any] = {"outcome": pair.outcome}
        if pair.ratio:
            found |= {"ratio": pair.ratio.value, "ratio_low": pair.ratio.low, "ratio_high": pair.ratio.high}
            found["basis"] = pair.ratio.basis
        lines.append({**_flat(pair.before), **found, **_columns("a", pair.before), **_columns("b", pair.after)})
    for side, alone in (("a", comparison.only_a), ("b", comparison.only_b)):
        lines += [{**_flat(row), "outcome": f"ONLY IN {side.upper()}", **_columns(side, row)} for row in alone]
    names = list(dict.fromkeys([*_CSV_COLUMNS, *(name for line in lines for name in line)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in line.items()} for line in lines)
    return text.getvalue()


def _describe(record: LoadedRecord) -> str:
    session = record.sessions[-1]
    facts = [str(record.path), session.device]
    if session.started:
        facts.append(session.started.replace("T", " ").split("+")[0])
    if commit := session.environment.get("commit"):
        facts.append(f"commit {commit}")
    return ", ".join(facts)


def _cells(pair: Pair, rows: Sequence[Measurement], several: bool) -> list[str]:
    label = label_of(pair.before, rows)
    interval = ""
    if pair.ratio and pair.ratio.low is not None and pair.ratio.high is not None:
        interval = f"{_number(pair.ratio.low)} to {_number(pair.ratio.high)}"
    return [
        f"{pair.before.operation} {label}" if several else label,
        pair.before.backend,
        _time(pair.before),
        _time(pair.after),
        _number(pair.ratio.value) if pair.ratio else "",
        interval,
        pair.outcome,
    ]


def _time(row: Measurement) -> str:
    return seconds(row.seconds) if row.seconds else row.status_words


def _number(ratio: float) -> str:
    return f"{ratio:.3f}" if 0.1 <= ratio < 10 else three(ratio)


def _why(pair: Pair, rows: Sequence[Measurement]) -> str:
    row, where = (pair.after, "B") if pair.outcome == "LOST" else (pair.before, "A")
    reason = f": {row.reason}" if row.reason else ""
    return f"{label_of(row, rows)}, {row.backend}: no time in {where}, {row.status_words}{reason}"


def _alone(rows: Sequence[Measurement]) -> Iterator[str]:
    jobs: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        jobs.setdefault((row.operation, row.backend), []).append(label_of(row, rows))
    for (operation, backend), names in jobs.items():
        yield f"{operation} by {backend}: {'; '.join(names)}"


def _side(record: LoadedRecord) -> dict[str, Any]:
    sessions = [{"started": s.started, "environment": s.environment, "peers": s.peers} for s in record.sessions]
    return {"path": str(record.path), "name": record.name, "schema": record.schema, "sessions": sessions}


def _what(row: Measurement) -> dict[str, Any]:
    return {
        "operation": row.operation,
        "job": row.job,
        "backend": row.backend,
        "model": row.model,
        "sizes": dict(row.sizes),
        "settings": dict(row.settings),
    }


def _measured(row: Measurement) -> dict[str, Any]:
    return {
        "seconds": row.seconds,
        "interval": list(row.interval) if row.interval else None,
        "samples": len(row.samples),
        "status": row.status,
        "reason": row.reason,
    }


def _flat(row: Measurement) -> dict[str, Any]:
    return {**row.sizes, **row.settings, **{k: v for k, v in _what(row).items() if not isinstance(v, dict)}}


def _columns(side: str, row: Measurement) -> dict[str, Any]:
    low, high = row.interval or (None, None)
    return {
        f"{side}_seconds": row.seconds,
        f"{side}_low": low,
        f"{side}_high": high,
        f"{side}_samples": len(row.samples) or None,
        f"{side}_status": row.status,
    }
