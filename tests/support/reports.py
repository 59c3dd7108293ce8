"""Rows as `mlakit bench` writes them, and what a page holds."""

import json
from pathlib import Path
from typing import Any

from mlakit.bench.config import RECORDED, BenchmarkConfig
from mlakit.bench.results import BenchmarkResult, CheckRow, GpuState, LimitRow, TimingRow

RESULTS = Path(__file__).parents[2] / "results" / "h200"
PARALLEL = RESULTS.parent / "h200x2" / "parallel.json"
CEILINGS = {"device": "a GPU", "copy_bytes_per_s": 4e12, "read_bytes_per_s": 4e12, "flops_per_s": 8e14}


def bench_row(
    backend: str = "sdpa", spec: str = "8q1s1k", median: float | None = 1e-3, *, gpu: GpuState | None = None,
    checked: bool = True, spread: float = 0.01, **fields: Any,
) -> BenchmarkResult:  # fmt: skip
    outcome = {name: fields.pop(name) for name in ("status", "error", "memory_temporary_mb") if name in fields}
    made = BenchmarkConfig(backend="sdpa", batch_spec=spec, **{"model": "deepseek-v2-lite", **fields})
    # As if read back from a record: its backend need not be one that is there.
    config = BenchmarkConfig.model_validate({**made.model_dump(), "backend": backend}, context=RECORDED)
    if median is None:
        return BenchmarkResult(config=config, **{"status": "timeout", "error": "no answer", **outcome})
    timing = TimingRow(
        median=median, mean=median, std=0, min=median, max=median, p20=median, p80=median,
        ci95=(median * (1 - spread), median * (1 + spread)), samples=[median, median],
    )  # fmt: skip
    numbers = dict.fromkeys(set(CheckRow.model_fields), 0.0)
    return BenchmarkResult(
        config=config, timing=timing, gpu=gpu, check=CheckRow(**numbers) if checked else None,
        limit=LimitRow(flops=10**9, bytes=10**8, seconds=2.5e-5, bound="memory"), **outcome,
    )  # fmt: skip


def data_of(text: str) -> dict[str, Any]:
    """The data inside a page's text."""
    start = text.index('<script type="application/json" id="data">') + len('<script type="application/json" id="data">')
    found: dict[str, Any] = json.loads(text[start : text.index("</script>", start)])
    return found
