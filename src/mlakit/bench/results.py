"""What a run leaves behind: `BenchmarkResult` (a row) and `Record` (the file), versioned. No torch here."""

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mlakit.bench.config import RECORDED, BenchmarkConfig
from mlakit.bench.files import write_atomically

SCHEMA: Literal["mlakit.bench/1"] = "mlakit.bench/1"

Status = Literal[
    "ok", "wrong", "unwritten", "unavailable", "unsupported", "out_of_memory", "timeout", "crashed", "error"
]
# Each status in a word or two for a table.
STATUS_WORDS: dict[Status, str] = {
    "ok": "ok",
    "wrong": "wrong result",
    "unwritten": "output not written",
    "unavailable": "not available",
    "unsupported": "not supported",
    "out_of_memory": "out of memory",
    "timeout": "timed out",
    "crashed": "crashed",
    "error": "failed",
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TimingRow(_Model):
    """Times of one call on one layer, in seconds; `host` is what the calling thread spends in it (None on a CPU)."""

    median: float
    mean: float
    std: float
    min: float
    max: float
    p20: float
    p80: float
    ci95: tuple[float, float]
    host: float | None = None
    samples: list[float]


# Within these, two rows are no different: the interval of a row says how well its own median is known, and not what
# the next row of the very same call shows. On an H200 five rows of one call of FlashMLA had medians from 28.3 to 29.6
# us, and four of another from 44.5 to 45.6, with intervals of 0.1 to 0.5 us (results/h200/backends_reorder.json).
SAME_SECONDS = 1.5e-6
SAME_PART = 0.01


def faster(one: TimingRow, other: TimingRow) -> int:
    """1 if one time is below the other, -1 if above, 0 if there is no telling them apart: their 95% intervals overlap,
    or the medians are closer than rows of the same call are.
    """
    apart, least = abs(one.median - other.median), min(one.median, other.median)
    if apart <= max(SAME_SECONDS, SAME_PART * least) or (one.ci95[0] <= other.ci95[1] and other.ci95[0] <= one.ci95[1]):
        return 0
    return 1 if one.median < other.median else -1


class CheckRow(_Model):
    """How far the worst part's output was from float64, and what was allowed (2x eager PyTorch's own error)."""

    max_error: float | None  # None stands for NaN and infinity, which JSON does not have
    max_error_allowed: float | None
    rms_error: float | None
    rms_error_allowed: float | None
    cosine_distance: float | None
    lse_error: float | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value


class LimitRow(_Model):
    """The least time this batch can take on this device at its measured ceilings, and which of them binds."""

    flops: int
    bytes: int
    seconds: float
    bound: Literal["compute", "memory"]


class GpuState(_Model):
    """NVML's view of the GPU while the row was timed: median clocks in MHz, highest power in W and temperature in C."""

    sm_clock: int | None = None
    memory_clock: int | None = None
    power: float | None = None
    temperature: int | None = None
    throttle_reasons: list[str] = []


class Place(_Model):
    """Where in a cluster a row was measured: the node as the cluster names it, and the GPU's UUID (None: its CPU).

    `attempt` is more than 1 if workers were lost while they measured the row.
    """

    node: str
    gpu: str | None = None
    attempt: int = 1


class BenchmarkResult(_Model):
    """One row: a config and what came of it. Times are seconds a call on one layer; None where there is no time."""

    config: BenchmarkConfig
    status: Status = "ok"
    error: str | None = None
    backend_version: str | None = None
    modes: dict[str, str] = Field(default_factory=dict)  # pipeline -> "mqa" or "mha"; empty for standard attention
    kernels: dict[str, str] = Field(default_factory=dict)  # pipeline -> what the library really ran, where it chooses
    timing: TimingRow | None = None
    check: CheckRow | None = None  # None if the row was not checked
    limit: LimitRow | None = None
    memory_allocated_mb: float | None = None
    memory_reserved_mb: float | None = None
    memory_temporary_mb: float | None = None
    gpu: GpuState | None = None
    started: str | None = None
    seconds: float | None = None
    session: int = 0
    place: Place | None = None  # None: the machine that the command ran on

    @property
    def success(self) -> bool:
        """True if the row has a time that counts."""
        return self.status == "ok"

    @property
    def mean_time(self) -> float | None:
        """Seconds, mean."""
        return self.timing.mean if self.timing else None

    @property
    def median_time(self) -> float | None:
        """Seconds, median."""
        return self.timing.median if self.timing else None

    @property
    def std_time(self) -> float | None:
        """Seconds, standard deviation."""
        return self.timing.std if self.timing else None

    @property
    def min_time(self) -> float | None:
        """Seconds, fastest call."""
        return self.timing.min if self.timing else None

    @property
    def max_time(self) -> float | None:
        """Seconds, slowest call."""
        return self.timing.max if self.timing else None

    @property
    def throughput_tokens_per_sec(self) -> float | None:
        """New tokens of the batch over the median time of a layer."""
        return sum(r.q_len for r in self.config.requests()) / self.timing.median if self.timing else None

    @property
    def fraction_of_limit(self) -> float | None:
        """The least possible time over the median: 1 is as fast as the device goes."""
        return self.limit.seconds / self.timing.median if self.timing and self.limit else None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON values, the derived figures included."""
        derived = (
            "mean_time", "median_time", "std_time", "min_time", "max_time", "throughput_tokens_per_sec",
            "fraction_of_limit", "success",
        )  # fmt: skip
        return {**self.model_dump(mode="json"), **{name: getattr(self, name) for name in derived}}


class Session(_Model):
    """One sitting: the machine and software that rows with this session's number were measured on, and its ceilings by
    dtype.
    """

    started: str
    command: list[str] = []
    environment: dict[str, Any]
    ceilings: dict[str, dict[str, Any]] = {}


class Record(_Model):
    """A run: what was asked, where it ran, every row so far. `complete` tells whether all planned rows are there."""

    record_schema: Literal["mlakit.bench/1"] = SCHEMA
    name: str
    description: str = ""
    mode: Literal["compare", "decode_vs_prefill"] = "compare"
    planned: int
    complete: bool = False
    executor: Literal["local", "ray"] = "local"
    # Whether all times that are compared with one another are from one GPU; None where there was but one.
    one_gpu_a_comparison: bool | None = None
    sessions: list[Session]
    rows: list[BenchmarkResult] = []
    findings: list[str] = []  # what a study concluded from the rows, in words

    def save(self, path: Path) -> None:
        """Write the file in one step: a reader, or a kill at any moment, finds the old or the new one, never half of
        either.
        """
        content = self.model_dump(mode="json")
        content["rows"] = [row.to_dict() for row in self.rows]
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read a record.

        Raises:
            ValueError: no such file, no JSON, another schema, or a malformed row; the message names the file.
        """
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        schema = content.get("record_schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path} is no record of this mlakit: expected schema {SCHEMA}, got {schema}")
        known = set(BenchmarkResult.model_fields)
        try:
            rows = [{k: v for k, v in row.items() if k in known} for row in content["rows"]]
            return cls.model_validate({**content, "rows": rows}, context=RECORDED)
        except (ValidationError, KeyError, AttributeError, TypeError) as error:
            detail = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": repr(error)}
            where = ".".join(map(str, detail["loc"]))
            raise ValueError(f"{path}: malformed record: {where}: {detail['msg']}") from error
