"""From decode-vs-prefill rows to a threshold: up to how many new tokens the decode pipeline is the faster one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf, log
from typing import Any, Literal

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import BenchmarkResult, faster
from mlakit.bench.units import percent

Verdict = Literal["decode", "prefill", "tie"]


@dataclass(frozen=True)
class Point:
    """Both pipelines at one q_len; a pipeline that could not run has no row with a time."""

    q_len: int
    decode: BenchmarkResult
    prefill: BenchmarkResult

    @property
    def verdict(self) -> Verdict | None:
        """The faster pipeline; "tie" where there is no telling (`results.faster`). A pipeline that cannot run loses;
        None if neither can.
        """
        decode, prefill = self.decode.timing, self.prefill.timing
        if decode is None or prefill is None:
            return None if decode is prefill else "prefill" if decode is None else "decode"
        sign = faster(decode, prefill)
        return "tie" if sign == 0 else "decode" if sign > 0 else "prefill"

    @property
    def ratio(self) -> float | None:
        """Decode's time over prefill's; None unless both have one."""
        if self.decode.timing is None or self.prefill.timing is None:
            return None
        return self.decode.timing.median / self.prefill.timing.median

    @property
    def lead(self) -> float | None:
        """By which part of the faster one's time the other is slower."""
        return None if self.ratio is None else max(self.ratio, 1 / self.ratio) - 1


@dataclass(frozen=True)
class Curve:
    """The points of one backend, batch size and sequence length, by q_len; `backend` is its name, or the sweep's label.

    Below, decode is *surely* faster where the two times can be told apart (`results.faster`).
    """

    backend: str
    batch_size: int
    kv_len: int
    points: tuple[Point, ...]

    @property
    def threshold(self) -> int:
        """The largest measured q_len up to which decode's median was never above prefill's (0: prefill already wins at
        the smallest).
        """
        return max((p.q_len for p in self._before(self.next_q_len)), default=0)

    @property
    def next_q_len(self) -> int | None:
        """The smallest q_len at which prefill was faster; None if decode won throughout."""
        return next((p.q_len for p in self.points if _prefill_wins(p)), None)

    @property
    def sure_decode(self) -> Point | None:
        """The last point up to which decode was surely faster at every q_len; None if it was not even at the first."""
        last = None
        for point in self.points:
            if point.verdict != "decode":
                break
            last = point
        return last

    @property
    def sure_prefill(self) -> Point | None:
        """The first point from which prefill was surely faster at every q_len; None if it was not even at the last."""
        first = None
        for point in reversed(self.points):
            if point.verdict != "prefill":
                break
            first = point
        return first

    @property
    def crossings(self) -> int:
        """How often the surely faster pipeline changes along the curve."""
        return changes(self.points)[0]

    @property
    def is_simple(self) -> bool:
        """Whether one threshold is right everywhere: the faster pipeline changes at most once, to prefill."""
        return changes(self.points)[1]

    def _before(self, q_len: int | None) -> Iterable[Point]:
        return (p for p in self.points if q_len is None or p.q_len < q_len)

    def __str__(self) -> str:
        batch = f"{self.backend}, batch {self.batch_size}, {self.kv_len} keys"
        if self.next_q_len is None:
            return f"{batch}: decode is faster up to q_len {self.threshold}, the longest measured"
        if self.threshold == 0:
            said = f"{batch}: prefill is faster from q_len {self.next_q_len} on, the shortest measured"
        else:
            said = f"{batch}: decode is faster up to q_len {self.threshold}, prefill from {self.next_q_len} on"
        return said + self._how_sure()

    def _how_sure(self) -> str:
        if not self.is_simple:
            times = f"{self.crossings} times" if self.crossings > 1 else "from prefill to decode"
            return f"; the faster one changes {times} along the curve, so no threshold is right everywhere"
        low, high = self.sure_decode, self.sure_prefill
        if low is None and high is None:
            return "; nowhere can the two be told apart"
        parts = []
        for name, point, upto in (("decode up to", low, True), ("prefill from", high, False)):
            if point is None:
                continue
            by = f" (by {percent(point.lead)})" if point.lead is not None else " (the other cannot run)"
            parts.append(f"{name} {point.q_len}{by}" if upto else f"{name} {point.q_len} on{by}")
        return f"; beyond the noise: {', '.join(parts)}"


def changes(points: Iterable[Point]) -> tuple[int, bool]:
    """How often the surely faster pipeline changes along points by q_len, and whether that is at most once and from
    decode to prefill.
    """
    sides = [p.verdict for p in points if p.verdict in ("decode", "prefill")]
    count = sum(a != b for a, b in pairwise(sides))
    return count, count == 0 or (count == 1 and sides[0] == "decode")


def _prefill_wins(point: Point) -> bool:
    return point.verdict == "prefill" if point.ratio is None else point.ratio > 1


def _rest(config: BenchmarkConfig) -> str:
    """Everything in a config that two rows of one curve share."""
    return config.model_dump_json(exclude={"batch_spec", "batch_name", "pipeline", "label", "timeout"})


def find_curves(rows: Sequence[BenchmarkResult]) -> list[Curve]:
    """Curves of all pairs of rows that differ in the pipeline alone, of which at least one has a time; batches of
    unequal requests are left out.
    """
    curves: dict[tuple[str, str, int, int], dict[int, dict[str, BenchmarkResult]]] = {}
    for row in rows:
        requests = row.config.requests()
        if row.config.pipeline == "auto" or len(set(requests)) != 1:
            continue
        title = row.config.title.removesuffix(f"_{row.config.pipeline}")
        curve = curves.setdefault((title, _rest(row.config), len(requests), requests[0].kv_len), {})
        curve.setdefault(requests[0].q_len, {})[row.config.pipeline] = row
    found = []
    for (title, _, size, kv_len), curve in curves.items():
        pairs = (Point(q_len, **both) for q_len, both in sorted(curve.items()) if len(both) == 2)
        points = tuple(point for point in pairs if point.verdict is not None)
        if points:
            found.append(Curve(title, size, kv_len, points))
    return found


@dataclass(frozen=True)
class Recommendation:
    """A `reorder_batch_threshold` for all of a backend's curves together, and what it costs where it is wrong.

    `loss` is the largest part by which the pipeline it picks is slower than the other, over all q_len at which any of
    the `curves` was measured (the others are interpolated there); `worst` is its (batch size, q_len), None if the
    threshold is nowhere wrong.
    """

    backend: str
    threshold: int
    loss: float
    worst: tuple[int, int] | None
    curves: int

    def __str__(self) -> str:
        said = f"{self.backend}: reorder_batch_threshold {self.threshold}"
        if self.worst is None:
            return f"{said}; it picks the faster pipeline everywhere"
        where = f"batch {self.worst[0]}, q_len {self.worst[1]}"
        if self.loss == inf:
            return f"{said}; at {where} the pipeline it picks cannot run"
        return f"{said}; it costs at most {percent(self.loss)} ({where})"


def recommend_thresholds(curves: Sequence[Curve]) -> list[Recommendation]:
    """For each backend the measured q_len (or 0) whose largest loss is least; of equals the one that loses least on
    average, then the smallest.
    """
    found = []
    for backend in dict.fromkeys(curve.backend for curve in curves):
        mine = [curve for curve in curves if curve.backend == backend]
        lens = sorted({point.q_len for curve in mine for point in curve.points})
        # What a curve loses at each q_len by either pipeline does not depend on the threshold.
        by_decode = {(curve.batch_size, q): _loss(curve, q, "decode") for curve in mine for q in lens}
        by_prefill = {(curve.batch_size, q): _loss(curve, q, "prefill") for curve in mine for q in lens}

        def losses(
            threshold: int, decode: dict[tuple[int, int], float] = by_decode, prefill: Any = by_prefill
        ) -> list[tuple[float, tuple[int, int]]]:
            return [((decode if at[1] <= threshold else prefill)[at], at) for at in decode]

        best = min(
            (0, *lens),
            key=lambda threshold: (max(losses(threshold))[0], sum(loss for loss, _ in losses(threshold)), threshold),
        )
        loss, worst = max(losses(best), key=lambda item: item[0])
        found.append(Recommendation(backend, best, loss, worst if loss > 0 else None, len(mine)))
    return found


def _loss(curve: Curve, q_len: int, picked: Literal["decode", "prefill"]) -> float:
    """By which part a pipeline is slower than the other at a q_len: a straight line between the measured ones on
    logarithmic axes; 0 beyond them, infinite where it cannot run and the other can.
    """
    low = next((p for p in reversed(curve.points) if p.q_len <= q_len), None)
    high = next((p for p in curve.points if p.q_len >= q_len), None)
    if low is None or high is None:
        return 0.0
    if low.ratio is None or high.ratio is None:
        near = low if low.ratio is None else high
        return inf if near.verdict != picked and (near is low or near.q_len == q_len) else 0.0
    part = 0.0 if low is high else log(q_len / low.q_len) / log(high.q_len / low.q_len)
    ratio = exp((1 - part) * log(low.ratio) + part * log(high.ratio))
    return max(0.0, (ratio if picked == "decode" else 1 / ratio) - 1)
