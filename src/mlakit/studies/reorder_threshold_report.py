"""What the study `reorder-threshold` prints: a line a curve, and a threshold with what it costs."""

from collections.abc import Sequence

from rich.console import Console

from mlakit.bench.crossover import Curve, Point, Recommendation
from mlakit.bench.results import BenchmarkResult
from mlakit.bench.units import percent, seconds
from mlakit.studies.fitted_table import Column, print_fitted

_COLUMNS = (
    Column("backend", right=False),
    Column("batch"),
    Column("decode up to"),
    Column("prefill from"),
    Column("decode q1", 3),
    Column("prefill q1", 4),
    Column("measured", 2),
    Column("changes", 1),
)


def print_curves(console: Console, curves: Sequence[Curve], title: str) -> None:
    """One line a backend and batch size."""
    print_fitted(console, title, _COLUMNS, [_line(curve) for curve in curves], sections=True)
    console.print(
        "decode up to, prefill from: the last and first q_len at which that pipeline was faster beyond the noise, "
        "and by how much; changes: how often the faster one changes along the curve",
        style="dim",
        soft_wrap=not console.is_terminal,
    )


def _line(curve: Curve) -> list[str]:
    first = curve.points[0]
    return [
        curve.backend,
        str(curve.batch_size),
        _edge(curve.sure_decode),
        _edge(curve.sure_prefill),
        _time(first.decode),
        _time(first.prefill),
        str(len(curve.points)),
        str(curve.crossings),
    ]


def _edge(point: Point | None) -> str:
    if point is None:
        return "-"
    return f"{point.q_len} ({percent(point.lead)})" if point.lead is not None else f"{point.q_len} (no other)"


def _time(row: BenchmarkResult) -> str:
    return seconds(row.timing.median) if row.timing is not None else "-"


def findings(curves: Sequence[Curve], recommended: Sequence[Recommendation], scope: str) -> list[str]:
    """The conclusions, a line each; all of them follow from the rows."""
    lines = []
    for found in recommended:
        mine = [curve for curve in curves if curve.backend == found.backend]
        lines.append(f"Recommended for {found}")
        thresholds = [curve.threshold for curve in mine]
        low, high = min(thresholds), max(thresholds)
        if len(mine) > 1:
            each = ", ".join(f"{curve.batch_size}: {curve.threshold}" for curve in mine)
            span = f"from {low} to {high}" if low != high else f"{low} for all"
            lines.append(f"  by batch size alone the best threshold is {span} ({each})")
        lines.append(f"  {_sureness(mine)}")
        if scope == "attention":
            lines.append(
                "  scope attention: the projections that tell the pipelines apart are not in these times, and the "
                "prefill pipeline starts from expanded keys; choose by --scope pipeline"
            )
    return lines


def _sureness(curves: Sequence[Curve]) -> str:
    """How well the changes are known."""
    folded = [curve for curve in curves if not curve.is_simple]
    open_ended = [curve for curve in curves if curve.crossings == 0]
    known = [
        high.q_len / low.q_len - 1
        for curve in curves
        if curve.is_simple and (low := curve.sure_decode) and (high := curve.sure_prefill)
    ]
    parts = []
    if known:
        within = percent(max(known)) if max(known) < 1 else f"a factor of {max(known) + 1:.0f}"
        of = f"{len(known)} of {len(curves)} curves"
        parts.append(f"the faster pipeline changes once on {of}, at a q_len known to within {within}")
    if open_ended:
        parts.append(f"on {len(open_ended)} of {len(curves)} it does not change within the lengths measured")
    if folded:
        sizes = ", ".join(str(curve.batch_size) for curve in folded)
        parts.append(f"at batch size {sizes} the faster one changes to and fro: no threshold is right there")
    return "how sure: " + "; ".join(parts) if parts else "how sure: no change lies beyond the noise"
