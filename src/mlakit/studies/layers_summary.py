"""What the study `layers` concludes: findings and recommendations that follow from the numbers. No torch here."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlakit.bench.units import seconds, three
from mlakit.studies.layers_report import Row, groups, mib, title_of


def markdown(rows: Sequence[Row], device: str, stamp: dict[str, Any], notes: Sequence[str]) -> str:
    """The whole report. `notes` say how it was measured."""
    environment = stamp["environment"]
    lines = [
        "# Layers: which implementation of Multi-head Latent Attention?",
        "",
        f"Measured {stamp['started'][:10]} on {device} with mlakit {environment['mlakit']}, torch "
        f"{environment['torch']}, triton {environment['triton']}.",
        *notes,
        "",
        "## Findings",
        "",
        *(f"- {line}" for line in findings(rows) or ["Nothing could be measured."]),
        "",
        "## Recommendations",
        "",
        *(f"- {line}" for line in recommendations(rows) or ["None: no two implementations were measured."]),
    ]
    for mine in groups(rows, lambda row: (row.shape, row.phase, row.mode)):
        lines += ["", f"## {_heading(mine[0])}: {mine[0].shape.title}", ""]
        lines += _tables(mine)
    return "\n".join(lines) + "\n"


def _heading(row: Row) -> str:
    title = title_of(row.phase, row.mode)
    return title[0].upper() + title[1:]


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    names = list(dict.fromkeys(row.implementation for row in rows))
    columns: tuple[tuple[str, Callable[[Row], str]], ...] = (
        ("Time in ms, the fastest bold", _cell),
        ("Tokens a second", lambda row: f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "-"),
        ("Temporary memory", lambda row: mib(row.temporary_mib)),
    )
    for title, cell in columns:
        yield f"{title}:"
        yield ""
        yield f"| batch x tokens | {' | '.join(names)} |"
        yield f"|--|{'--|' * len(names)}"
        for job in groups(rows):
            by_name = {row.implementation: row for row in job}
            best = min((row.seconds for row in job if row.seconds), default=None)
            cells = []
            for name in names:
                row = by_name.get(name)
                text = cell(row) if row else "-"
                bold = row is not None and row.seconds == best and cell is _cell and best is not None
                cells.append(f"**{text}**" if bold else text)
            yield f"| {job[0].size} | {' | '.join(cells)} |"
        yield ""


def _cell(row: Row) -> str:
    return three(row.seconds * 1e3) if row.seconds else row.reason.partition(" (")[0].replace("|", "/")


def leaders(job: Sequence[Row]) -> list[str]:
    """The fastest implementation of a size, and those that cannot be told from it: their intervals overlap."""
    timed = sorted((row for row in job if row.seconds), key=lambda row: row.seconds or 0.0)
    return [row.implementation for row in timed if _low(row) <= _high(timed[0])]


def _low(row: Row) -> float:
    return max(row.ci95[0] if row.ci95 else row.median or 0.0, row.host or 0.0 if row.mode == "eager" else 0.0)


def _high(row: Row) -> float:
    return max(row.ci95[1] if row.ci95 else row.median or 0.0, row.host or 0.0 if row.mode == "eager" else 0.0)


def findings(rows: Sequence[Row]) -> list[str]:
    """What the numbers say, for each shape."""
    return _by_shape(rows, _findings)


def recommendations(rows: Sequence[Row]) -> list[str]:
    """What to use, as far as the numbers go, for each shape."""
    return _by_shape(rows, _recommendations)


def _by_shape(rows: Sequence[Row], about: Callable[[Sequence[Row]], list[str]]) -> list[str]:
    shapes = groups(rows, lambda row: row.shape)
    if len(shapes) < 2:
        return about(rows)
    return [f"{mine[0].shape.slug}: {line}" for mine in shapes for line in about(mine)]


def _findings(rows: Sequence[Row]) -> list[str]:
    found: list[str] = []
    for mine in groups(rows, lambda row: (row.phase, row.mode)):
        name = _heading(mine[0])
        jobs = [job for job in groups(mine) if sum(row.seconds is not None for row in job) > 1]
        if jobs:
            found.append(f"{name}: {_who_wins(jobs)}")
            found += [f"{name}: {line}" for line in _over_naive(jobs)]
    found += _memory(rows)
    found += _host(rows)
    for reason, lost in _without_time(rows).items():
        found.append(f"No time, {reason}: {lost}")
    return found


def _who_wins(jobs: Sequence[Sequence[Row]]) -> str:
    wins: dict[str, list[str]] = {}
    tied = []
    for job in jobs:
        first = leaders(job)
        wins.setdefault(first[0], []).append(job[0].size)
        if len(first) > 1:
            tied.append(f"{job[0].size} ({' and '.join(first)})")
    order = sorted(wins.items(), key=lambda item: -len(item[1]))
    every = f" in {len(order[0][1])} of {len(jobs)} sizes" if len(jobs) > 1 else ""
    parts = [f"{order[0][0]} is the fastest{every}"]
    parts += [f"{name} in {len(sizes)} ({_some(sizes)})" for name, sizes in order[1:]]
    text = ", ".join(parts)
    return f"{text}; not to be told apart: {_some(tied)}" if tied else text


def _some(items: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(items[:most])
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown


def _over_naive(jobs: Sequence[Sequence[Row]]) -> Iterator[str]:
    factors: dict[str, list[float]] = {}
    for job in jobs:
        naive = next((row.seconds for row in job if row.implementation == "naive"), None)
        for row in job:
            if naive and row.seconds and row.implementation != "naive":
                factors.setdefault(row.implementation, []).append(naive / row.seconds)
    for name, found in factors.items():
        mean = f" (geometric mean {_mean(found):.2f}x over {len(found)} sizes)" if len(found) > 1 else ""
        yield f"{name} is {_span(found)} as fast as naive{mean}"


def _span(factors: Sequence[float]) -> str:
    low, high = f"{min(factors):.2f}x", f"{max(factors):.2f}x"
    return low if low == high else f"{low} to {high}"


def _mean(factors: Sequence[float]) -> float:
    return math.exp(sum(math.log(factor) for factor in factors) / len(factors))


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    for phase in dict.fromkeys(row.phase for row in rows):
        jobs = [
            job
            for job in groups([row for row in rows if row.phase == phase and row.mode == "eager"])
            if sum(row.temporary_mib is not None for row in job) > 1
        ]
        if not jobs:
            continue
        job = max(jobs, key=lambda job: (sum(r.temporary_mib is not None for r in job), job[0].batch * job[0].seq_len))
        sizes = [(row.temporary_mib, row.implementation) for row in job if row.temporary_mib is not None]
        listed = ", ".join(f"{name} {mib(size)}" for size, name in sorted(sizes))
        yield f"Memory: a {phase} of {job[0].size} takes on top of weights, inputs and cache: {listed}"
    caches: dict[str, float] = {}
    for row in rows:
        if row.cache_mib:  # the least of all sizes, as the unused end of a page is no part of a token
            each = row.cache_mib * 2**20 / (row.batch * row.seq_len)
            caches[row.implementation] = min(each, caches.get(row.implementation, each))
    if len(set(caches.values())) > 1:
        least, most = min(caches.values()), max(caches.values())
        listed = ", ".join(f"{name} {size:,.0f}" for name, size in sorted(caches.items(), key=lambda item: item[1]))
        yield f"Memory: cache in bytes a token: {listed}: {most / least:.1f}x apart"


def _host(rows: Sequence[Row]) -> Iterator[str]:
    for phase in dict.fromkeys(row.phase for row in rows):
        eager = [row for row in rows if row.phase == phase and row.mode == "eager" and row.median and row.host]
        bound = [row for row in eager if (row.host or 0) > (row.median or 0)]
        if bound:
            worst = max(bound, key=lambda row: (row.host or 0) / (row.median or 1))
            yield (
                f"Launching: in {len(bound)} of {len(eager)} eager {phase} rows the host takes longer than the GPU, at "
                f"most {seconds(worst.host or 0)} for {seconds(worst.median or 0)} of work ({worst.implementation}, "
                f"{worst.size})"
            )
    gains = _graph_gains(rows)
    for name, factors in gains.items():
        yield f"Launching: a CUDA graph makes {name}'s decode {_span(factors)} as fast"


def _graph_gains(rows: Sequence[Row]) -> dict[str, list[float]]:
    gains: dict[str, list[float]] = {}
    for mine in groups(
        [r for r in rows if r.phase == "decode"], lambda r: (r.shape, r.batch, r.seq_len, r.implementation)
    ):
        times = {row.mode: row.seconds for row in mine if row.seconds}
        if len(times) == 2:
            gains.setdefault(mine[0].implementation, []).append(times["eager"] / times["graph"])
    return gains


def _without_time(rows: Sequence[Row]) -> dict[str, str]:
    lost: dict[str, list[str]] = {}
    for row in rows:
        if row.median is None:
            lost.setdefault(row.reason, []).append(f"{row.implementation} {title_of(row.phase, row.mode)} {row.size}")
    return {reason: _some(list(dict.fromkeys(names)), 6) for reason, names in lost.items()}


def _recommendations(rows: Sequence[Row]) -> list[str]:
    found = []
    for phase in dict.fromkeys(row.phase for row in rows):
        mode = "graph" if any(row.phase == phase and row.mode == "graph" and row.median for row in rows) else "eager"
        jobs = [
            job
            for job in groups([row for row in rows if row.phase == phase and row.mode == mode])
            if sum(row.seconds is not None for row in job) > 1
        ]
        if not jobs:
            continue
        found.append(f"For {title_of(phase, mode)}: {_choice(jobs)}")
        frugal = _frugal(jobs)
        if frugal:
            found.append(f"For {title_of(phase, mode)}: {frugal}")
    for name, factors in _graph_gains(rows).items():
        if _mean(factors) >= 1.05:
            found.append(f"Decode with {name} from a CUDA graph: {_mean(factors):.2f}x on average")
    return found


def _behind(jobs: Sequence[Sequence[Row]], value: Callable[[Row], float | None]) -> dict[str, float]:
    """How many times the best of each size an implementation takes, on average; only those that did every size."""
    found: dict[str, list[float]] = {}
    for job in jobs:
        values = {row.implementation: v for row in job if row.median is not None and (v := value(row))}
        for name, v in values.items():
            found.setdefault(name, []).append(v / min(values.values()))
    whole = {name: _mean(f) for name, f in found.items() if len(f) == len(jobs)}
    return whole or {name: _mean(f) for name, f in found.items()}


def _choice(jobs: Sequence[Sequence[Row]]) -> str:
    behind = _behind(jobs, lambda row: row.seconds)
    best = min(behind, key=lambda name: behind[name])
    lost = [job for job in jobs if best not in leaders(job)]
    if not lost:
        return f"{best}, the fastest or as fast as any at every size measured"
    others = []
    for job in lost:
        first = leaders(job)[0]
        times = {row.implementation: row.seconds for row in job if row.seconds}
        how = f"is {times[best] / times[first]:.2f}x as fast" if best in times else "alone has a time"
        others.append(f"{job[0].size} ({first} {how})")
    return f"{best}, on average {behind[best]:.2f}x the time of the best at each size; not at {_some(others)}"


def _frugal(jobs: Sequence[Sequence[Row]]) -> str:
    """The implementation that takes least memory, if that is another one than the fastest."""
    time, memory = _behind(jobs, lambda row: row.seconds), _behind(jobs, lambda row: row.memory_mib)
    common = set(time) & set(memory)
    if not common:
        return ""
    fast, small = min(common, key=lambda name: time[name]), min(common, key=lambda name: memory[name])
    if memory[fast] <= 1.05 * memory[small]:
        return ""
    return (
        f"where memory is short, {small}: cache and temporaries of {fast} are {memory[fast] / memory[small]:.1f}x as "
        f"large, and {small} takes {time[small] / time[fast]:.2f}x its time"
    )
