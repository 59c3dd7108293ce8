"""Read any record that mlakit writes - of `mlakit bench`, of a study, of `make bench-h200` - into one form that tables,
pages, plots and comparisons share. No torch here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlakit.bench.batch_spec import BatchRequest, get_batch_type
from mlakit.bench.ceilings import Ceilings
from mlakit.bench.crossover import Curve, find_curves, recommend_thresholds
from mlakit.bench.results import SCHEMA as BENCH_SCHEMA
from mlakit.bench.results import STATUS_WORDS, BenchmarkResult, Record

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Session:
    """Where and when rows were measured. `ceilings` by dtype ("bf16"); `peers` are libraries and their versions."""

    environment: Mapping[str, Any]
    started: str | None = None
    ceilings: Mapping[str, Ceilings] = field(default_factory=dict)
    peers: Mapping[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The device's name."""
        device = self.environment.get("device")
        name = device.get("name") if isinstance(device, Mapping) else device
        return str(name or "unknown device")


@dataclass(frozen=True)
class Measurement:
    """One backend on one job: seconds, bytes and operations of a call; None where it was not measured.

    `operation` is the kind of job ("attention", "mla_decode", "layer"), `job` its name there (a batch spec, or what the
    record calls it), `phase` "decode", "prefill", "extend", "mixed" or "". `sizes` is what a job is made of: rows with
    the same `comparison` may be compared. `settings` is what one backend may do otherwise than another at the same job.
    `samples` are all times where the record has them. `version` is the backend's. `checked` is None where the record
    does not say; those of `make bench-h200` and of the studies hold no time that did not pass. `place` names the GPU of
    a cluster that a row was measured on.
    """

    operation: str
    job: str
    backend: str
    phase: str = ""
    model: str = ""
    sizes: Mapping[str, Value] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""
    seconds: float | None = None
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] = ()
    host_seconds: float | None = None
    flops: float | None = None
    bytes: float | None = None
    limit_seconds: float | None = None
    bound: str = ""
    memory_bytes: float | None = None
    checked: bool | None = None
    predicted: bool = False
    throttled: tuple[str, ...] = ()
    temperature: int | None = None
    clock_mhz: int | None = None
    version: str = ""
    session: int = 0
    place: str = ""

    @property
    def job_key(self) -> str:
        """Equal for rows that measured the same job, whatever the backend."""
        return json.dumps([self.operation, self.model, self.job, dict(sorted(self.sizes.items()))])

    @property
    def comparison(self) -> tuple[str, str]:
        """Equal for rows whose times may be compared: the same job on the same GPU, where a cluster has several."""
        return self.job_key, self.place

    @property
    def identity(self) -> str:
        """Equal for rows that measured the same thing: the same job, backend and settings."""
        return json.dumps([self.job_key, self.backend, dict(sorted(self.settings.items()))])

    @property
    def fraction_of_limit(self) -> float | None:
        """The least possible time over the measured one."""
        return self.limit_seconds / self.seconds if self.limit_seconds and self.seconds else None

    @property
    def status_words(self) -> str:
        """The status as people read it."""
        return {str(k): v for k, v in STATUS_WORDS.items()}.get(self.status, self.status)


@dataclass(frozen=True)
class LoadedRecord:
    """A record file. `curves` are where decode and prefill cross, `conclusions` what follows from them in words, and
    `differences` how far results were from one another or from float64 (study correctness). `left_out` counts rows that
    are no jobs, by what the record calls them.
    """

    path: Path
    schema: str
    name: str
    sessions: tuple[Session, ...]
    rows: tuple[Measurement, ...]
    description: str = ""
    complete: bool = True
    planned: int | None = None
    curves: tuple[Curve, ...] = ()
    conclusions: tuple[str, ...] = ()
    differences: tuple[Mapping[str, Any], ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def session(self, row: Measurement) -> Session:
        """Where a row of this record was measured."""
        return self.sessions[row.session]


def load_record(path: Path) -> LoadedRecord:
    """Read a record, whatever part of mlakit wrote it. Of a run's folder, the `record.json` in it.

    Raises:
        ValueError: no such file, no JSON, a schema that this mlakit does not know, or a malformed record; the message
            is one line that names the file.
    """
    from mlakit.report.load_studies import READERS, left_out

    if path.is_dir():
        path = path / "record.json"
    content = _read(path)
    schema = content.get("record_schema") or content.get("schema")
    if schema == BENCH_SCHEMA:
        return _bench(path)
    if not isinstance(schema, str) or schema not in READERS:
        known = ", ".join((BENCH_SCHEMA, *READERS))
        raise ValueError(f"{path}: its schema is {schema!r}, and this mlakit reads: {known}")
    try:
        rows, differences = READERS[schema](content)
        return LoadedRecord(
            path=path,
            schema=schema,
            name=_file_name(path),
            sessions=(_session(content),),
            rows=tuple(rows),
            complete=bool(content.get("complete", True)),
            differences=tuple(differences),
            left_out=left_out(content),
        )
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: malformed record of schema {schema}: {type(error).__name__}: {error}") from error


def load_records(paths: Sequence[Path]) -> list[LoadedRecord]:
    """Read several. Those that call themselves the same get their files' names, so that a reader can tell them apart.

    Raises:
        ValueError: see `load_record`; or none is given.
    """
    if not paths:
        raise ValueError("expected at least one record (a .json that mlakit bench or a study wrote), got none")
    records = [load_record(path) for path in paths]
    for name in (lambda record: _file_name(record.path), lambda record: str(record.path)):
        counts = Counter(record.name for record in records)
        records = [replace(r, name=name(r)) if counts[r.name] > 1 else r for r in records]
    return records


def _file_name(path: Path) -> str:
    """What a file is called; a run's `record.json` by its folder."""
    return path.parent.name if path.stem == "record" and path.parent.name else path.stem


def dtype_name(name: str) -> str:
    """The short name of a torch dtype: "bfloat16" is "bf16"."""
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, name)


def uniform_sizes(requests: Sequence[BatchRequest]) -> dict[str, Value]:
    """Sizes of a batch whose requests are all alike; none of another."""
    if len(set(requests)) != 1:
        return {}
    return {"batch": len(requests), "q_len": requests[0].q_len, "keys": requests[0].kv_len}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(), parse_constant=lambda _: None)  # NaN: no number was measured
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict) or not (content.get("record_schema") or content.get("schema")):
        raise ValueError(f"{path} is no record of mlakit's: it names no schema")
    return content


def ceilings_of(found: Mapping[str, Any]) -> Ceilings:
    """Those of a record."""
    rates = (float(found[name]) for name in ("copy_bytes_per_s", "read_bytes_per_s", "flops_per_s"))
    return Ceilings(str(found.get("device", "")), dtype_name(str(found.get("dtype", ""))), *rates)


def _session(content: Mapping[str, Any]) -> Session:
    if content["schema"] == "mlakit.tuning/1":
        environment = {"device": {"name": content["device"]}, "torch": content["torch"], "triton": content["triton"]}
        return Session(environment=environment, started=content["date"])
    if not isinstance(content["environment"], Mapping):
        raise ValueError(f"environment: expected an object, got {content['environment']!r}")
    ceilings = [ceilings_of(content["ceilings"])] if content.get("ceilings") else []
    return Session(
        environment=content["environment"],
        started=content.get("started"),
        ceilings={c.dtype: c for c in ceilings},
        peers=content.get("peers") or {},
    )


def _bench(path: Path) -> LoadedRecord:
    record = Record.load(path)
    curves = find_curves(record.rows) if record.mode == "decode_vs_prefill" else []
    sessions = tuple(
        Session(
            environment=session.environment,
            started=session.started,
            ceilings={dtype: ceilings_of(found) for dtype, found in session.ceilings.items()},
        )
        for session in record.sessions
    )
    return LoadedRecord(
        path=path,
        schema=BENCH_SCHEMA,
        name=_file_name(path) if record.name == "custom" else record.name,  # a run of flags alone has no name
        sessions=sessions,
        rows=tuple(_bench_row(row) for row in record.rows),
        description=record.description,
        complete=record.complete,
        planned=record.planned,
        curves=tuple(curves),
        # A study's findings hold the thresholds already.
        conclusions=(*(record.findings or map(str, recommend_thresholds(curves))), *map(str, curves)),
    )


def _bench_row(row: BenchmarkResult) -> Measurement:
    config, timing, limit, gpu = row.config, row.timing, row.limit, row.gpu
    sizes: dict[str, Value] = {
        "heads": config.num_q_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "dtype": config.dtype,
        "scope": config.scope,
        "l2": config.l2,
    }
    if config.attention == "mla":
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        sizes |= {name: getattr(config, name) for name in names}
    sizes |= uniform_sizes(config.requests())
    settings: dict[str, Value] = {
        "backend": config.backend,
        "pipeline": config.pipeline,
        "num_layers": config.num_layers,
        "block_size": config.block_size,
        "cuda_graph": config.cuda_graph,
        "reorder_batch_threshold": config.reorder_batch_threshold,
        **config.parameters,
    }
    return Measurement(
        operation="attention" if config.attention == "mla" else "standard attention",
        job=config.batch_title,
        backend=config.title,
        phase=get_batch_type(config.batch_spec),
        model=config.model or "",
        sizes=sizes,
        settings=settings,
        status=row.status,
        reason=row.error or "",
        seconds=timing.median if timing else None,
        interval=timing.ci95 if timing else None,
        samples=tuple(timing.samples) if timing else (),
        host_seconds=timing.host if timing else None,
        flops=float(limit.flops) if limit else None,
        bytes=float(limit.bytes) if limit else None,
        limit_seconds=limit.seconds if limit else None,
        bound=limit.bound if limit else "",
        memory_bytes=None if row.memory_temporary_mb is None else row.memory_temporary_mb * 2**20,
        checked=row.check is not None if row.success else None,
        throttled=tuple(gpu.throttle_reasons) if gpu else (),
        temperature=gpu.temperature if gpu else None,
        clock_mhz=gpu.sm_clock if gpu else None,
        version=row.backend_version or "",
        session=row.session,
        place=row.place.gpu or row.place.node if row.place else "",
    )
