"""From decode-vs-prefill rows to a threshold: up to how many new tokens the decode pipeline is the faster one."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import BenchmarkResult


@dataclass(frozen=True)
class Crossover:
    """What one backend's rows say for one batch size and sequence length; `backend` is its name, or the sweep's label.

    `threshold` is the largest measured q_len up to which decode was never slower than prefill (0: prefill already wins
    at the smallest). `next_q_len` is the smallest one at which prefill was faster, None if decode won throughout.
    """

    backend: str
    batch_size: int
    kv_len: int
    threshold: int
    next_q_len: int | None
    measured: tuple[int, ...]

    def __str__(self) -> str:
        batch = f"{self.backend}, batch {self.batch_size}, {self.kv_len} keys"
        if self.next_q_len is None:
            return f"{batch}: decode is faster up to q_len {self.threshold}, the longest measured"
        if self.threshold == 0:
            return f"{batch}: prefill is faster from q_len {self.next_q_len} on, the shortest measured"
        return f"{batch}: decode is faster up to q_len {self.threshold}, prefill from {self.next_q_len} on"


def _rest(config: BenchmarkConfig) -> str:
    """Everything in a config that two rows of one curve share."""
    return config.model_dump_json(exclude={"batch_spec", "pipeline", "label", "timeout"})


def find_crossovers(rows: Sequence[BenchmarkResult]) -> list[Crossover]:
    """Crossovers of all pairs of rows that differ in the pipeline alone; batches of unequal requests are left out."""
    curves: dict[tuple[str, str, int, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        requests = row.config.requests()
        if row.timing is None or row.config.pipeline == "auto" or len(set(requests)) != 1:
            continue
        title = row.config.title.removesuffix(f"_{row.config.pipeline}")
        curve = curves.setdefault((title, _rest(row.config), len(requests), requests[0].kv_len), {})
        curve.setdefault(requests[0].q_len, {})[row.config.pipeline] = row.timing.median
    found = []
    for (title, _, size, kv_len), curve in curves.items():
        pairs = sorted((q_len, times) for q_len, times in curve.items() if len(times) == 2)
        if not pairs:
            continue
        slower = next((q_len for q_len, times in pairs if times["prefill"] < times["decode"]), None)
        threshold = max((q_len for q_len, _ in pairs if slower is None or q_len < slower), default=0)
        found.append(Crossover(title, size, kv_len, threshold, slower, tuple(q for q, _ in pairs)))
    return found
