"""The rows of the studies' records and of `make bench-h200`'s, as `load.Measurement`s."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mlakit.bench.batch_spec import parse_batch_spec
from mlakit.report.load import Measurement, Value, ceilings_of, dtype_name, uniform_sizes

Rows = Iterable[Measurement]
Differences = Iterable[Mapping[str, Any]]

_MIB = 2**20
# Of a speed script's row: what was measured, or says who took part. Other whole numbers, words and flags are sizes, and
# fractions are figures derived from the times.
_NOT_SIZES = {
    "op",
    "row",
    "job",
    "impl",
    "method",
    "peer",
    "temporary_bytes",
    "kernel",
    "wrong",
    "error",
    "reason",
    "note",
    "shape",
}
_FLOAT8 = ("fp8_gemm", "indexer_logits", "indexer_logits_paged")  # operations that multiply in it


def limit(
    ceilings: Mapping[str, Any] | None, flops: float | None, bytes_: float | None, narrow: bool = False
) -> tuple[float | None, str]:
    """Least seconds by a record's ceilings, and what binds ("compute" or "memory"); None where they say nothing.

    `narrow` tells that operations may be in a narrower format than the ceiling's: those have no ceiling here.
    """
    if not ceilings or not (flops or bytes_):
        return None, ""
    least, bound = ceilings_of(ceilings).limit(0.0 if narrow else flops or 0.0, bytes_ or 0.0)
    return (least, bound) if least else (None, "")


def speed(content: Mapping[str, Any]) -> tuple[Rows, Differences]:
    """`make bench-h200`: rows of one operation or several, best first. The kernels inside a call are left out."""
    return [_speed_row(row, content.get("ceilings")) for row in content["rows"] if not _is_kernel(row)], ()


def left_out(content: Mapping[str, Any]) -> dict[str, int]:
    """Rows that `speed` leaves out: how many of each kind."""
    rows = content["rows"] if content["schema"] == "mlakit.speed/1" else ()
    return dict(Counter(str(row["op"]) for row in rows if _is_kernel(row)))


def _is_kernel(row: Mapping[str, Any]) -> bool:
    return str(row["op"]).endswith("_kernels")


def _speed_row(row: Mapping[str, Any], ceilings: Mapping[str, Any] | None) -> Measurement:
    sizes: dict[str, Value] = {}
    for name, value in row.items():
        if name not in _NOT_SIZES and isinstance(value, str | int):
            sizes["tokens" if name == "new_tokens" else name] = dtype_name(str(value)) if name == "dtype" else value
    seconds, backend = row.get("median_s"), str(row.get("impl") or row["method"])  # of timing: who, or how
    bytes_, flops = (
        row[name] * seconds * 1e12 if seconds and row.get(name) else None for name in ("tb_per_s", "tflop_per_s")
    )
    narrow = row["op"] in _FLOAT8 or "fp8" in f"{backend} {sizes.get('dtype', '')}"
    least, bound = limit(ceilings, flops, bytes_, narrow)
    operation, named = str(row["op"]), str(row.get("row") or row.get("job") or row.get("shape") or "")
    # Words of the name that no field tells, such as "ragged": those jobs are of another kind.
    told = {*sizes, *(str(value) for value in sizes.values()), *operation.split("_")}
    if kinds := [word for word in named.split() if word.isalpha() and word not in told]:
        sizes["kind"] = " ".join(kinds)
    return Measurement(
        operation=operation,
        job=named or ", ".join(f"{name} {value}" for name, value in sizes.items()),
        backend=backend,
        phase=next((phase for phase in ("decode", "prefill") if phase in f"{operation} {named}"), ""),
        sizes=sizes,
        status="ok" if seconds else "no time",
        reason=str(row.get("reason") or row.get("error") or row.get("note") or ""),
        seconds=seconds,
        interval=_pair(row.get("ci95_s")),
        host_seconds=row.get("host_s"),
        flops=flops,
        bytes=bytes_,
        limit_seconds=least,
        bound=bound,
        memory_bytes=row.get("temporary_bytes"),
    )


def k_concat(content: Mapping[str, Any]) -> tuple[Rows, Differences]:
    """Study k-concat: methods to build keys."""
    rows = []
    for row in content["rows"]:
        sizes = {name: row[name] for name in ("batch", "heads", "nope", "rope")} | {"dtype": dtype_name(row["dtype"])}
        least, bound = limit(content.get("ceilings"), None, row["moved_bytes"])
        for name, found in row["methods"].items():
            rows.append(
                _method(found, "concat_k", f"batch {row['batch']}, {sizes['dtype']}", name, sizes)
                | {"bytes": row["moved_bytes"], "limit_seconds": least, "bound": bound}
            )
    return [Measurement(**row) for row in rows], ()


def sparse_prefill(content: Mapping[str, Any]) -> tuple[Rows, Differences]:
    """Study sparse-prefill: attention to selected keys beside attention to all."""
    rows = []
    for row in content["rows"]:
        sizes = {"q_len": row["s_q"], "keys": row["s_kv"], "topk": row["topk"], "heads": row["heads"]}
        job = f"{row['s_q']} of {row['s_kv']}, topk {row['topk']}"
        for name, found in row["methods"].items():
            least, bound = limit(content.get("ceilings"), found.get("flops"), None)
            rows.append(
                _method(found, "sparse prefill", job, name, sizes)
                | {"flops": found.get("flops"), "phase": "prefill", "limit_seconds": least, "bound": bound}
            )
    return [Measurement(**row) for row in rows], ()


def _method(
    found: Mapping[str, Any], operation: str, job: str, name: str, sizes: Mapping[str, Value]
) -> dict[str, Any]:
    return {
        "operation": operation,
        "job": job,
        "backend": name,
        "sizes": dict(sizes),
        **_outcome(found.get("median"), found.get("reason") or "", found.get("reason") == "wrong result"),
        "interval": _pair(found.get("ci95")),
        "memory_bytes": _bytes(found.get("peak_mib")),
    }


def layers(content: Mapping[str, Any]) -> tuple[Rows, Differences]:
    """Study layers: implementations of the layer."""
    rows = []
    for row in content["rows"]:
        graph = ", CUDA graph" if row["mode"] == "graph" else ""
        rows.append(
            Measurement(
                operation="layer",
                job=f"{row['phase']} {row['batch']}x{row['seq_len']}{graph}",
                backend=row["implementation"],
                phase=row["phase"],
                model=_model(content, row["shape"]),
                sizes={
                    "batch": row["batch"],
                    "tokens" if row["phase"] == "prefill" else "keys": row["seq_len"],
                    "mode": row["mode"],
                    "dtype": row["dtype"],
                },
                **_outcome(row["median"], row["reason"], row["wrong"]),
                interval=_pair(row["ci95"]),
                host_seconds=row["host"],
                memory_bytes=_bytes(row["temporary_mib"], row["cache_mib"]),
                checked=row["relative"] is not None if row["median"] else None,
            )
        )
    return rows, ()


def correctness(content: Mapping[str, Any]) -> tuple[Rows, Differences]:
    """Study correctness: latencies, and the differences that it is about."""
    rows = []
    for row in content["rows"]:
        if row["implementation"] == "float64":
            continue  # what others are compared with; nothing of it is timed
        for phase in ("prefill", "decode"):
            ms = row[f"{phase}_ms"]
            rows.append(
                Measurement(
                    operation="layer",
                    job=f"{phase} {row['batch']}x{row['seq_len']}",
                    backend=row["implementation"],
                    phase=phase,
                    model=_model(content),
                    sizes={
                        "batch": row["batch"],
                        "tokens" if phase == "prefill" else "keys": row["seq_len"],
                        "mode": "eager",
                        "dtype": row["dtype"],
                    },
                    **_outcome(None if ms is None else ms * 1e-3, row["reason"], False),
                    memory_bytes=_bytes(row[f"{phase}_temporary_mib"], row["cache_mib"]),
                )
            )
    return rows, content["pairs"]


def fast_path(content: Mapping[str, Any]) -> tuple[Rows, Differences]:
    """Study fast-path: the layer on short sequences, with and without its path for them."""
    rows = []
    for row in content["rows"]:
        for name, found in row["variants"].items():
            ms, ci, host = found["ms"], found["ci95_ms"], found["host_ms"]
            rows.append(
                Measurement(
                    operation="layer on short sequences",
                    job=f"{row['batch']}x{row['seq_len']}",
                    backend=name,
                    phase="prefill",
                    model=_model(content),
                    sizes={"batch": row["batch"], "tokens": row["seq_len"], "dtype": content["options"]["dtype"]},
                    **_outcome(None if ms is None else ms * 1e-3, found["reason"], found["wrong"]),
                    interval=None if ci is None else (ci[0] * 1e-3, ci[1] * 1e-3),
                    host_seconds=None if host is None else host * 1e-3,
                    memory_bytes=_bytes(found["temporary_mib"]),
                    checked=True if ms is not None else None,
                )
            )
    return rows, ()


def tuning(content: Mapping[str, Any]) -> tuple[Rows, Differences]:
    """Launch variants that were compared while a kernel was written; `run` counts the runs from 1."""
    rows = [
        Measurement(
            operation=f"{content['operation']} variants",
            job=row["row"],
            backend=row["impl"],
            sizes={"run": number},
            seconds=row["median_us"] * 1e-6,
            host_seconds=row["host_us"] * 1e-6 if "host_us" in row else None,
            bytes=row["tb_per_s"] * row["median_us"] * 1e6 if "tb_per_s" in row else None,
            flops=row["tflop_per_s"] * row["median_us"] * 1e6 if "tflop_per_s" in row else None,
        )
        for number, run in enumerate(content["runs"], 1)
        for row in run["rows"]
    ]
    return rows, ()


def parallel(content: Mapping[str, Any]) -> tuple[Rows, Differences]:
    """Study parallel: a decode batch over several ranks. What was predicted says so in its name."""
    rows = []
    for row in content["rows"]:
        plan, strategy = row["plan"], row["plan"]["strategy"]
        name = strategy if strategy == "one" else f"{strategy} {plan['tp']}x{plan['cp']}"
        # One rank alone is the fastest of them: the slower of several by chance is what nobody runs.
        median, interval = row["median"], _pair(row["ci95"])
        if strategy == "one" and median and min(row["by_rank"]) < median:
            median, interval = min(row["by_rank"]), None
        states = [state for state in row["gpus"] if state]
        rows.append(
            Measurement(
                operation=f"{row['scope']} over ranks",
                job=row["batch"],
                backend=f"{name}, predicted" if row["predicted"] else name,
                phase="decode",
                model=_model(content),
                sizes={"mode": row["mode"], **uniform_sizes(parse_batch_spec(row["batch"]))},
                settings={"backend": strategy, "ranks": row["ranks"], "predicted": row["predicted"]},
                predicted=row["predicted"],
                **_outcome(median, row["reason"], row["wrong"]),
                interval=interval,
                checked=None if row["predicted"] or not median else row["error"] is not None,
                throttled=tuple(sorted({reason for state in states for reason in state["throttle_reasons"]})),
                clock_mhz=min((state["sm_clock"] for state in states if state["sm_clock"]), default=None),
                temperature=max((state["temperature"] for state in states if state["temperature"]), default=None),
            )
        )
    return rows, ()


def _outcome(seconds: float | None, reason: str, wrong: bool) -> dict[str, Any]:
    status = "wrong" if wrong else "ok" if seconds is not None else "no time"
    return {"seconds": None if wrong else seconds, "status": status, "reason": reason}


def _model(content: Mapping[str, Any], shape: Mapping[str, Any] | None = None) -> str:
    options = content["options"]
    name = str(options.get("model") or "")
    if shape is None or len(options.get("shapes") or ()) <= 1:
        return name
    return f"{name} {shape['n_heads']} heads, dim {shape['dim']}".strip()


def _bytes(*mib: float | None) -> float | None:
    known = [value for value in mib if value is not None]
    return sum(known) * _MIB if mib[0] is not None else None


def _pair(found: Any) -> tuple[float, float] | None:
    return (float(found[0]), float(found[1])) if found else None


def readers() -> Iterator[tuple[str, Callable[[Mapping[str, Any]], tuple[Rows, Differences]]]]:
    """Schema and reader of each kind of record."""
    yield "mlakit.speed/1", speed
    for reader in (k_concat, sparse_prefill, layers, correctness, fast_path, tuning, parallel):
        yield f"mlakit.{reader.__name__}/1", reader


READERS = dict(readers())
