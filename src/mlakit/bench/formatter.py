"""`ResultsFormatter`: rows as a table, a CSV file or a record."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mlakit.bench.files import write_atomically
from mlakit.bench.results import BenchmarkResult, Record
from mlakit.bench.table import make_console, print_table


class ResultsFormatter:
    """Shows and saves rows of a run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console()

    def print_table(
        self,
        results: Sequence[BenchmarkResult],
        backends: Sequence[str] | None = None,
        compare_to_fastest: bool = True,
        title: str | None = None,
    ) -> None:
        """Print rows grouped by batch.

        Args:
            results: the rows.
            backends: only rows of these backends (or with these labels); None for all.
            compare_to_fastest: with a column that compares each row with the fastest of its batch.
            title: above the table.
        """
        rows = [r for r in results if backends is None or {r.config.backend, r.config.title} & set(backends)]
        print_table(self.console, rows, relative=compare_to_fastest, title=title)

    def save_csv(self, results: Sequence[BenchmarkResult], path: str | Path) -> None:
        """Write one line a row, all figures that are single numbers, in SI units; an existing file is replaced in one
        step.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        lines = [_flat(row) for row in results]
        header = list(dict.fromkeys(key for line in lines for key in line)) or list(_CSV_COLUMNS)
        writer.writerow(header)
        writer.writerows([line.get(key, "") for key in header] for line in lines)
        write_atomically(Path(path), text.getvalue())

    def save_json(self, results: Sequence[BenchmarkResult], path: str | Path, record: Record | None = None) -> None:
        """Write the rows with the record they belong to (environment, ceilings), or alone, as a list, if it is not at
        hand.
        """
        if record is not None:
            record.model_copy(update={"rows": list(results)}).save(Path(path))
        else:
            write_atomically(Path(path), json.dumps([row.to_dict() for row in results], indent=1) + "\n")


_CSV_COLUMNS = (
    "backend", "label", "batch_spec", "status", "median_time", "mean_time", "std_time", "min_time", "max_time",
    "ci95_low", "ci95_high", "samples", "host_time",
    "throughput_tokens_per_sec", "fraction_of_limit", "limit_seconds", "limit_bound", "flops", "bytes",
    "memory_allocated_mb", "memory_reserved_mb", "memory_temporary_mb", "max_error", "rms_error", "sm_clock",
    "node", "gpu_uuid", "backend_version", "kernels", "error",
)  # fmt: skip
_SHOWN_FIRST = {"backend", "label", "batch_spec", "parameters"}


def _flat(row: BenchmarkResult) -> dict[str, Any]:
    timing, limit, check = row.timing, row.limit, row.check
    values = {
        "backend": row.config.backend,
        "label": row.config.title,
        "batch_spec": row.config.batch_spec,
        "status": row.status,
        "ci95_low": timing.ci95[0] if timing else None,
        "ci95_high": timing.ci95[1] if timing else None,
        "samples": len(timing.samples) if timing else None,
        "host_time": timing.host if timing else None,
        "limit_seconds": limit.seconds if limit else None,
        "limit_bound": limit.bound if limit else None,
        "flops": limit.flops if limit else None,
        "bytes": limit.bytes if limit else None,
        "max_error": check.max_error if check else None,
        "rms_error": check.rms_error if check else None,
        "sm_clock": row.gpu.sm_clock if row.gpu else None,
        "node": row.place.node if row.place else None,
        "gpu_uuid": row.place.gpu if row.place else None,
        "kernels": "; ".join(f"{part}: {kernel}" for part, kernel in row.kernels.items()) or None,
    }
    flat = {name: values[name] if name in values else getattr(row, name) for name in _CSV_COLUMNS}
    config = {k: v for k, v in row.config.model_dump(mode="json").items() if k not in _SHOWN_FIRST}
    parameters = {f"parameter.{name}": value for name, value in row.config.parameters.items()}
    return {k: "" if v is None else v for k, v in {**flat, **config, **parameters}.items()}
