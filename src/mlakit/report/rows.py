"""What the page shows, as plain values: jobs, rows with names that tell them apart, ceilings. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlakit.bench.grouping import grouped
from mlakit.report.load import LoadedRecord, Measurement, Session, Value

# The operations that a reader looks for first; others follow in the order of the records.
_FIRST = (
    "attention", "standard attention", "mla_decode", "mla_prefill", "mla_sparse_decode", "mla_sparse_prefill", "layer",
)  # fmt: skip


@dataclass
class Entry:
    """A measurement, with where it is from and what it is called on the page."""

    row: Measurement
    record: LoadedRecord
    label: str = ""

    @property
    def session(self) -> Session:
        """Where it was measured."""
        return self.record.session(self.row)

    @property
    def job(self) -> tuple[str, ...]:
        """Equal for what may be compared: the same job on the same kind of device, and of a cluster the same one."""
        return (*self.row.comparison, self.session.device)


def entries_of(records: Sequence[LoadedRecord]) -> list[Entry]:
    """All rows, operations that matter most first, each under a name of its own in its job."""
    found = [Entry(row, record, row.backend) for record in records for row in record.rows]
    order = {name: i for i, name in enumerate(_FIRST)}
    found.sort(key=lambda entry: order.get(entry.row.operation, len(_FIRST)))
    for mine in grouped(found, lambda entry: (entry.row.operation, entry.row.backend)):
        _name(mine)
    return found


def _name(entries: Sequence[Entry]) -> None:
    """Tell rows of one backend apart where a job has several: by their settings, else by where they are from."""
    differing = _differing([entry.row.settings for entry in entries])
    telling: tuple[Callable[[Entry], str], ...] = (
        lambda entry: ", ".join(f"{k} {v}" for k, v in entry.row.settings.items() if k in differing),
        lambda entry: entry.record.name,
        lambda entry: str(entry.record.path),
        lambda entry: f"started {entry.session.started}",
    )
    for more in telling:
        if not _twice(entries):
            return
        longer = [f"{entry.label} ({more(entry)})" if more(entry) else entry.label for entry in entries]
        before = {(entry.job, entry.label) for entry in entries}
        if len({(entry.job, label) for entry, label in zip(entries, longer, strict=True)}) > len(before):
            for entry, label in zip(entries, longer, strict=True):
                entry.label = label
    for same in _twice(entries):  # measured twice in one go
        for number, entry in enumerate(same[1:], start=2):
            entry.label = f"{entry.label} ({number})"


def _twice(entries: Sequence[Entry]) -> list[list[Entry]]:
    return [same for same in grouped(entries, lambda entry: (entry.job, entry.label)) if len(same) > 1]


def _differing(mappings: Iterable[Mapping[str, Value]]) -> list[str]:
    seen: dict[str, set[Value]] = {}
    mappings = list(mappings)
    for name in dict.fromkeys(name for mapping in mappings for name in mapping):
        seen[name] = {mapping.get(name) for mapping in mappings}
    return [name for name, values in seen.items() if len(values) > 1]


def job_titles(jobs: Sequence[Sequence[Entry]]) -> list[str]:
    """A title for each job: its own name, and behind it what tells it from others of the same name."""
    titles = [job[0].row.job for job in jobs]
    same: dict[tuple[str, str], list[int]] = {}
    for i, job in enumerate(jobs):
        same.setdefault((job[0].row.operation, titles[i]), []).append(i)
    for indices in same.values():
        if len(indices) > 1:
            for i, trait in zip(indices, _traits([jobs[i][0] for i in indices]), strict=True):
                titles[i] = f"{titles[i]} · {trait}"
    return titles


def _traits(firsts: Sequence[Entry]) -> list[str]:
    """What tells jobs of one name apart, in as few words as do."""
    candidates: list[dict[str, Value]] = [
        {
            "model": e.row.model, **e.row.sizes, "device": e.session.device, "record": e.record.name,
            "place": e.row.place,
        }
        for e in firsts
    ]  # fmt: skip
    found: list[list[str]] = [[] for _ in firsts]
    for name in dict.fromkeys(name for traits in candidates for name in traits):
        more = [[*mine, _trait(name, traits.get(name))] for mine, traits in zip(found, candidates, strict=True)]
        if len({tuple(m) for m in more}) > len({tuple(m) for m in found}):
            found = more
        if len({tuple(m) for m in found}) == len(found):
            break
    texts = [", ".join(filter(None, mine)) for mine in found]
    return [text or e.record.name for text, e in zip(texts, firsts, strict=True)]


def _trait(name: str, value: Value) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, str) and name not in ("scope", "l2"):
        return value
    return f"{name} {str(value).lower()}"


def page_data(records: Sequence[LoadedRecord], baseline: str | None = None) -> dict[str, Any]:
    """All that the page's script reads, as JSON values.

    Raises:
        ValueError: no record has a row, or none of the rows is the baseline's.
    """
    entries = entries_of(records)
    if not entries:
        names = ", ".join(str(record.path) for record in records)
        raise ValueError(f"nothing to report: no rows in {names}")
    labels = list(dict.fromkeys(entry.label for entry in entries))
    if baseline is not None and baseline not in labels:
        raise ValueError(f"--baseline: no row of {baseline!r}; the records have: {', '.join(labels)}")
    jobs = grouped(entries, lambda entry: entry.job)
    titles = job_titles(jobs)
    return {
        "baseline": baseline,
        "operations": list(dict.fromkeys(entry.row.operation for entry in entries)),
        "jobs": [_job(job, title) for job, title in zip(jobs, titles, strict=True)],
        "rows": [_row(entry, i) for i, job in enumerate(jobs) for entry in job],
        "roofs": _roofs(records),
        "thresholds": [
            {
                "record": record.name,
                "backend": curve.backend,
                "batch": curve.batch_size,
                "keys": curve.kv_len,
                "threshold": curve.threshold,
                "longest": curve.next_q_len is None,
                "text": str(curve),
            }
            for record in records
            for curve in record.curves
        ],
        "conclusions": [
            {"record": record.name, "lines": list(record.conclusions)} for record in records if record.conclusions
        ],
        "differences": [
            {"record": record.name, **difference} for record in records for difference in record.differences
        ],
    }


def _job(job: Sequence[Entry], title: str) -> dict[str, Any]:
    row = job[0].row
    return {
        "operation": row.operation,
        "title": title,
        "phase": row.phase,
        "model": row.model,
        "device": job[0].session.device,
        "records": list(dict.fromkeys(entry.record.name for entry in job)),
        "sizes": dict(row.sizes),
    }


def _row(entry: Entry, job: int) -> dict[str, Any]:
    row = entry.row
    return {
        "job": job,
        "backend": entry.label,
        "base": str(row.settings.get("backend", row.backend)),
        "status": row.status,
        "words": row.status_words,
        "reason": row.reason,
        "time": row.seconds,
        "low": row.interval[0] if row.interval else None,
        "high": row.interval[1] if row.interval else None,
        "host": row.host_seconds,
        "flops": row.flops,
        "bytes": row.bytes,
        "limit": row.limit_seconds,
        "bound": row.bound,
        "memory": row.memory_bytes,
        "checked": row.checked,
        "predicted": row.predicted,
        "throttled": list(row.throttled),
        "temperature": row.temperature,
        "clock": row.clock_mhz,
        "settings": dict(row.settings),
        "record": entry.record.name,
    }


def _roofs(records: Sequence[LoadedRecord]) -> list[dict[str, Any]]:
    """Measured ceilings, one for each device and dtype: of the session that reached most, as a ceiling is the best
    that was seen.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for session in (session for record in records for session in record.sessions):
        for dtype, most in session.ceilings.items():
            roof = {"device": session.device, "dtype": dtype, "bytes": most.bytes_per_s, "flops": most.flops_per_s}
            old = found.get((session.device, dtype), roof)
            found[session.device, dtype] = {
                **roof, "bytes": max(roof["bytes"], old["bytes"]), "flops": max(roof["flops"], old["flops"]),
            }  # fmt: skip
    return list(found.values())
