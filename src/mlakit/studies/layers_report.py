"""The rows of the study `layers`, as a table and as CSV. No torch here."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlakit.bench.grouping import grouped
from mlakit.bench.units import rate, seconds, three
from mlakit.studies.layer_options import Shape

_GIB_IN_MIB = 1024


@dataclass
class Row:
    """One implementation at one size: seconds, or in `reason` why there are none.

    `mode` is "eager", or "graph" where the step was replayed from a CUDA graph. `median` and `ci95` are of the time on
    the device; `host` is what the calling thread spends in an eager call. `temporary_mib` is the peak on top of
    weights, inputs and cache; `relative` and `worst_token` are differences from float64 (None: not checked).
    """

    shape: Shape
    implementation: str
    phase: str
    mode: str
    batch: int
    seq_len: int
    dtype: str
    reason: str = ""
    median: float | None = None
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    ci95: tuple[float, float] | None = None
    samples: int | None = None
    host: float | None = None
    temporary_mib: float | None = None
    allocated_mib: float | None = None
    cache_mib: float | None = None
    weights_mib: float | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    relative: float | None = None
    worst_token: float | None = None
    cosine: float | None = None
    wrong: bool = False

    @property
    def seconds(self) -> float | None:
        """Time a call when one follows the other: the device's, or the host's where launching takes longer."""
        if self.median is None:
            return None
        return max(self.median, self.host or 0.0) if self.mode == "eager" else self.median

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens a second: all of a prefill, one a request of a decode step."""
        new = self.batch * (self.seq_len if self.phase == "prefill" else 1)
        return new / self.seconds if self.seconds else None

    @property
    def memory_mib(self) -> float | None:
        """What the implementation takes beside its weights and inputs: cache and temporaries."""
        return None if self.temporary_mib is None else self.temporary_mib + (self.cache_mib or 0.0)

    @property
    def job(self) -> tuple[Any, ...]:
        """Rows with the same job may be compared."""
        return (self.shape, self.phase, self.mode, self.batch, self.seq_len)

    @property
    def size(self) -> str:
        """For people."""
        return f"{self.batch} x {self.seq_len}"

    @classmethod
    def from_json(cls, found: Mapping[str, Any], shapes: Sequence[Shape]) -> "Row":
        """What `as_json` made of a row, of one of these shapes."""
        shape = next(shape for shape in shapes if json.loads(json.dumps(shape.fields())) == found["shape"])
        plain = {name.name: found[name.name] for name in fields(cls)}
        return cls(**{**plain, "shape": shape, "ci95": plain["ci95"] and tuple(plain["ci95"])})

    def as_json(self) -> dict[str, Any]:
        """Plain values, derived ones included; infinite differences become None beside `wrong`."""
        found = {**asdict(self), "shape": self.shape.fields(), "tokens_per_s": self.tokens_per_s}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def title_of(phase: str, mode: str) -> str:
    """Name a phase: "prefill", "decode" or "decode, CUDA graph"."""
    return f"{phase}, CUDA graph" if mode == "graph" else phase


def groups(rows: Sequence[Row], key: Callable[[Row], Any] = lambda row: row.job) -> list[list[Row]]:
    """Rows with the same key together, in order of first appearance."""
    return grouped(rows, key)


def header() -> str:
    """The head of the table on the console."""
    return (
        f"{'phase':18} {'batch':>5} {'tokens':>6} {'implementation':14} {'time':>9} {'host':>9} {'tokens/s':>10} "
        f"{'temporary':>10} {'cache':>10} {'error':>8} {'speed-up':>8}"
    )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of the rows of a size, the fastest marked; a row without a time says why."""
    best = min((row.seconds for row in rows if row.seconds), default=None)
    naive = next((row.seconds for row in rows if row.implementation == "naive"), None)
    for row in rows:
        start = f"{title_of(row.phase, row.mode):18} {row.batch:>5} {row.seq_len:>6} {row.implementation:14}"
        if row.median is None:
            yield f"{start} {row.reason}"
            continue
        over = f"{naive / row.seconds:.2f}x" if naive and row.seconds else "-"
        yield (
            f"{start} {seconds(row.median):>9} {seconds(row.host) if row.host else '-':>9} "
            f"{rate(row.tokens_per_s or 0, ''):>10} {mib(row.temporary_mib):>10} {mib(row.cache_mib):>10} "
            f"{f'{row.relative:.4f}' if row.relative is not None else '-':>8} {over:>8}"
            f"{'  fastest' if row.seconds == best and len(rows) > 1 else ''}"
        )


def mib(value: float | None) -> str:
    """A size as people read it."""
    if value is None:
        return "-"
    return f"{three(value / _GIB_IN_MIB)} GiB" if value >= _GIB_IN_MIB else f"{three(value)} MiB"


def csv_text(rows: Sequence[Row]) -> str:
    """A line a row: sizes, seconds, MiB."""
    lines = []
    for row in rows:
        flat = row.as_json()
        shape, ci95 = flat.pop("shape"), flat.pop("ci95") or (None, None)
        lines.append({**flat, "ci95_low": ci95[0], "ci95_high": ci95[1], **shape})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for line in lines for k in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in line.items()} for line in lines)
    return text.getvalue()
