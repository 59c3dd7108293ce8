"""What a reader must know before believing a number: machines, software, and what was wrong while it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlakit.bench.units import percent, rate
from mlakit.report.load import BENCH_SCHEMA, LoadedRecord, Measurement, Session

# Of a record's environment, what a time can depend on, and how people call it.
_WORDS = {
    "device": "device", "driver": "driver", "cuda": "CUDA", "torch": "torch", "triton": "triton", "mlakit": "mlakit",
    "commit": "commit", "python": "Python", "system": "system", "threads": "CPU threads",
}  # fmt: skip
_MEMORY = "memory ceiling"
_LONG = ("device", "system", "other libraries", "CPU threads", "Python")
_MACHINE = ("device", "driver", "system", "threads")
_WIDE = 0.1  # an interval that reaches further from its median than this is worth a word
_CLOCKS_DIFFER = 0.05  # the same for the clocks of a session's rows


@dataclass
class Column:
    """Sessions that do not differ in any fact, and what was measured there; ceilings by name, as (lowest, highest)."""

    records: list[str]
    facts: dict[str, str]
    ceilings: dict[str, tuple[float, float]]

    @property
    def title(self) -> str:
        """The records' names, some of them if they are many."""
        more = f" and {len(self.records) - 3} more" if len(self.records) > 3 else ""
        return ", ".join(self.records[:3]) + more

    @property
    def texts(self) -> dict[str, str]:
        """Facts and ceilings as people read them."""
        return {**self.facts, **{word: _span(word, bounds) for word, bounds in self.ceilings.items()}}


def _span(word: str, bounds: Iterable[float]) -> str:
    unit = "B/s" if word == _MEMORY else "FLOP/s"
    return " to ".join(dict.fromkeys(rate(bound, unit) for bound in bounds))


def brief(columns: Sequence[Column]) -> str:
    """Versions and ceilings in a line; where they are not the same everywhere, that they differ."""
    found = []
    for word in dict.fromkeys(word for column in columns for word in column.texts):
        if word in _LONG:
            continue
        texts = {column.texts.get(word) for column in columns}
        bounds = [bound for column in columns for bound in column.ceilings.get(word, ())]
        if bounds and len({column.facts.get("device") for column in columns}) == 1:
            found.append(f"{word} {_span(word, (min(bounds), max(bounds)))}")
        else:
            found.append(f"{word} {texts.pop() if len(texts) == 1 else 'differs'}")
    return ", ".join(found)


def environments(records: Sequence[LoadedRecord]) -> list[Column]:
    """Where the records were measured, sessions with the same facts together."""
    found: list[Column] = []
    for record in records:
        for session in record.sessions:
            facts = _facts(session)
            column = next((column for column in found if column.facts == facts), None)
            if column is None:
                found.append(column := Column([], facts, {}))
            if record.name not in column.records:
                column.records.append(record.name)
            for dtype, most in session.ceilings.items():
                for word, value in ((_MEMORY, most.bytes_per_s), (f"{dtype} ceiling", most.flops_per_s)):
                    low, high = column.ceilings.get(word, (value, value))
                    column.ceilings[word] = (min(low, value), max(high, value))
    return found


def _facts(session: Session) -> dict[str, str]:
    facts = {word: _text(name, session.environment) for name, word in _WORDS.items()}
    if session.peers:
        facts["other libraries"] = ", ".join(f"{name} {version}" for name, version in session.peers.items())
    return {word: text for word, text in facts.items() if text}


def _text(name: str, environment: Mapping[str, Any], part: str = "name") -> str:
    value = environment.get(name)
    if isinstance(value, Mapping):
        value = value.get(part)
    return "" if value is None else str(value)


def warnings(records: Sequence[LoadedRecord]) -> list[str]:
    """Sentences for the top of a report, those that weigh most first; none if there is nothing to say."""
    found = _differing_machines(records)
    for record in records:
        found += [f"{record.name}: {line}" for line in _of_record(record)]
    return found


def _differing_machines(records: Sequence[LoadedRecord]) -> list[str]:
    sessions = [session for record in records for session in record.sessions]
    values = {name: list(dict.fromkeys(_text(name, session.environment) for session in sessions)) for name in _WORDS}
    if not any(_text("device", session.environment, "kind") == "cpu" for session in sessions):
        del values["threads"]  # a GPU's times do not depend on them
    found = []
    for what, names in (("Machines", _MACHINE), ("Software", [name for name in _WORDS if name not in _MACHINE])):
        differing = [name for name in names if len(values.get(name, ())) > 1]
        if differing:
            words = "; ".join(
                f"{_WORDS[name]} {' and '.join(v or 'unknown' for v in values[name])}" for name in differing
            )
            found.append(
                f"{what} differ{'s' * (what == 'Software')} between the records, compare them with care: {words}"
            )
    return found


def _of_record(record: LoadedRecord) -> list[str]:
    rows, timed = record.rows, [row for row in record.rows if row.seconds]
    found = []
    if not record.complete:
        of = f" of {record.planned}" if record.planned else ""
        how = " (the same command with --resume goes on)" if record.schema == BENCH_SCHEMA else ""
        found.append(f"incomplete, {len(rows)}{of} rows measured{how}")
    if wrong := [row for row in rows if row.status in ("wrong", "unwritten")]:
        found.append(f"{_rows(wrong)} gave a wrong result and got no time: {_which(wrong)}")
    if differing := [d for d in record.differences if not d.get("agrees", True)]:
        pairs = ", ".join(dict.fromkeys(f"{d.get('first')} and {d.get('second')}" for d in differing))
        found.append(f"implementations disagree: {pairs}")
    if held := [row for row in timed if row.throttled]:
        reasons = ", ".join(sorted({reason for row in held for reason in row.throttled}))
        kind = "thermal" if "thermal" in reasons else "throttled"
        found.append(f"{kind}: the GPU held itself back ({reasons}) in {_rows(held)}: {_which(held)}")
    for index in range(len(record.sessions)):
        clocks = [row.clock_mhz for row in timed if row.clock_mhz and row.session == index]
        if clocks and max(clocks) - min(clocks) > _CLOCKS_DIFFER * max(clocks):
            found.append(f"clocks differ between rows: {min(clocks)} to {max(clocks)} MHz")
    if unchecked := [row for row in timed if row.checked is False]:
        found.append(f"{_rows(unchecked)} timed without a check of the result")
    wide = [
        row for row in timed
        if row.seconds and row.interval and max(row.seconds - row.interval[0], row.interval[1] - row.seconds)
        > _WIDE * row.seconds
    ]  # fmt: skip
    if wide:
        found.append(f"noisy: the 95% interval of {_rows(wide)} is wider than ±{percent(_WIDE)}: {_which(wide)}")
    commits = {str(session.environment.get("commit")) for session in record.sessions}
    if any(commit.endswith("+dirty") for commit in commits):
        found.append("measured with changes that were not committed")
    for name, count in record.left_out.items():
        found.append(f"{count} rows of {name}, the kernels inside calls, are not shown; they are in the record")
    return found


def _rows(rows: Sequence[Measurement]) -> str:
    return f"{len(rows)} row{'s' if len(rows) > 1 else ''}"


def _which(rows: Sequence[Measurement], most: int = 3) -> str:
    named = [f"{row.backend} on {row.job}" for row in rows[:most]]
    return ", ".join(named) + (f" and {len(rows) - most} more" if len(rows) > most else "")
