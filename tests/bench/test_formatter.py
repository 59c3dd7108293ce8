import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.formatter import ResultsFormatter
from mlakit.bench.results import BenchmarkResult, CheckRow, GpuState, LimitRow, Record, Session, TimingRow


def config(backend: str = "sdpa", spec: str = "8q1s1k", **fields: Any) -> BenchmarkConfig:
    return BenchmarkConfig.model_validate({"backend": backend, "batch_spec": spec, "model": "tiny", **fields})


TIMING = TimingRow(
    median=2e-3, mean=3e-3, std=5e-4, min=1e-3, max=4e-3, p20=1.5e-3, p80=2.5e-3, ci95=(1.9e-3, 2.1e-3),
    samples=[1e-3, 2e-3, 4e-3],
)  # fmt: skip
GOOD = BenchmarkResult(
    config=config(label="sdpa_16h", reorder_batch_threshold=4, parameters={"num_kv_splits": 2}),
    timing=TIMING,
    limit=LimitRow(flops=10**15, bytes=2**40, seconds=5e-4, bound="memory"),
    check=CheckRow(max_error=1e-3, max_error_allowed=1, rms_error=1e-4, rms_error_allowed=1, cosine_distance=0),
    memory_allocated_mb=12.5,
    memory_reserved_mb=20.0,
    memory_temporary_mb=0.5,
    gpu=GpuState(sm_clock=1980),
    backend_version="torch 2.13.0",
)
BAD = BenchmarkResult(
    config=config("torch_naive", "2q64_q1s1k", parameters={"layout": "nhd"}),
    status="crashed",
    error='signal 11, in "kernel", with a comma\nand a line',
)
RECORD = Record(
    name="mine", planned=2, complete=True, sessions=[Session(started="now", environment={"device": {"name": "a CPU"}})]
)


def saved_csv(rows: Sequence[BenchmarkResult], path: Path) -> list[dict[str, str]]:
    ResultsFormatter().save_csv(rows, path)
    return list(csv.DictReader(path.open(newline="")))


def test_csv_has_every_single_figure_in_si_units(tmp_path):
    good, bad = saved_csv([GOOD, BAD], tmp_path / "deep" / "r.csv")
    texts = {"backend": "sdpa", "label": "sdpa_16h", "batch_spec": "8q1s1k", "status": "ok", "limit_bound": "memory"}
    assert {name: good[name] for name in texts} == texts
    figures = {
        "median_time": 2e-3,
        "mean_time": 3e-3,
        "std_time": 5e-4,
        "min_time": 1e-3,
        "max_time": 4e-3,
        "ci95_low": 1.9e-3,
        "ci95_high": 2.1e-3,
        "samples": 3,
        "throughput_tokens_per_sec": 8 / 2e-3,
        "fraction_of_limit": 0.25,
        "limit_seconds": 5e-4,
        "flops": 10**15,
        "bytes": 2**40,
        "memory_allocated_mb": 12.5,
        "memory_reserved_mb": 20.0,
        "memory_temporary_mb": 0.5,
        "max_error": 1e-3,
        "rms_error": 1e-4,
        "sm_clock": 1980,
    }
    assert {name: float(good[name]) for name in figures} == pytest.approx(figures)
    assert good["backend_version"] == "torch 2.13.0"
    # A row without a time has its reason, and nothing where a figure would be.
    assert (bad["status"], bad["error"], bad["label"]) == ("crashed", BAD.error, "torch_naive")
    assert {bad[name] for name in figures} == {""}


def test_csv_tells_what_was_measured(tmp_path):
    good, bad = saved_csv([GOOD, BAD], tmp_path / "r.csv")
    fields = set(BenchmarkConfig.model_fields) - {"parameters"}
    assert fields <= set(good)
    settings = {name: getattr(GOOD.config, name) for name in fields - {"label"}}
    assert {name: good[name] for name in settings} == {k: "" if v is None else str(v) for k, v in settings.items()}
    # A column for each parameter that any row has.
    assert (good["parameter.num_kv_splits"], good["parameter.layout"]) == ("2", "")
    assert (bad["parameter.num_kv_splits"], bad["parameter.layout"]) == ("", "nhd")


def test_csv_says_which_kernels_ran(tmp_path):
    ran = GOOD.model_copy(update={"kernels": {"decode": "x 1.0, fa3", "prefill": "y 2.0"}})
    told, not_told = saved_csv([ran, GOOD], tmp_path / "r.csv")
    assert (told["kernels"], not_told["kernels"]) == ("decode: x 1.0, fa3; prefill: y 2.0", "")


def test_csv_columns_are_there_once_and_begin_with_the_row(tmp_path):
    ResultsFormatter().save_csv([GOOD, BAD], tmp_path / "r.csv")
    header = next(csv.reader((tmp_path / "r.csv").open(newline="")))
    assert len(set(header)) == len(header)
    assert header[:5] == ["backend", "label", "batch_spec", "status", "median_time"]


def test_csv_of_no_rows_is_a_header(tmp_path):
    assert saved_csv([], tmp_path / "r.csv") == []
    header = (tmp_path / "r.csv").read_text().splitlines()[0].split(",")
    full = saved_csv([GOOD], tmp_path / "full.csv")[0]
    assert header == list(full)[: len(header)]


def test_csv_replaces_what_was_there(tmp_path):
    saved_csv([GOOD, BAD, GOOD], tmp_path / "r.csv")
    assert len(saved_csv([BAD], tmp_path / "r.csv")) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["r.csv"]


def test_json_with_its_record(tmp_path):
    ResultsFormatter().save_json([GOOD, BAD], tmp_path / "r.json", RECORD)
    loaded = Record.load(tmp_path / "r.json")
    assert loaded == RECORD.model_copy(update={"rows": [GOOD, BAD]})
    assert RECORD.rows == []  # the record given is left as it was


def test_json_of_rows_alone(tmp_path):
    ResultsFormatter().save_json([GOOD, BAD], str(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == [GOOD.to_dict(), BAD.to_dict()]


@pytest.mark.parametrize(
    ("backends", "there", "gone"),
    # All; by backend; by label; by either; nobody's name.
    [
        (None, ["sdpa_16h", "torch_naive"], []),
        (["torch_naive"], ["torch_naive"], ["sdpa_16h"]),
        (["sdpa_16h"], ["sdpa_16h"], ["torch_naive"]),
        (["sdpa"], ["sdpa_16h"], ["torch_naive"]),
        (["sdpa", "torch_naive"], ["sdpa_16h", "torch_naive"], []),
        (["nobody"], [], ["sdpa_16h", "torch_naive"]),
    ],
)
def test_print_table_of_some_backends(backends, there, gone):
    file = io.StringIO()
    formatter = ResultsFormatter(Console(file=file, width=200))
    formatter.print_table([GOOD, BAD], backends)
    assert all(name in file.getvalue() for name in there)
    assert not any(name in file.getvalue() for name in gone)


@pytest.mark.parametrize("compare", [True, False])
def test_print_table_compares_if_asked(compare):
    file = io.StringIO()
    slower = GOOD.model_copy(update={"timing": TIMING.model_copy(update={"median": 4e-3})})
    ResultsFormatter(Console(file=file, width=200)).print_table([GOOD, slower], compare_to_fastest=compare)
    assert ("vs best" in file.getvalue()) == compare
    assert ("2.00x" in file.getvalue()) == compare


def test_print_table_goes_to_standard_output(capsys):
    ResultsFormatter().print_table([GOOD], title="a title")
    captured = capsys.readouterr()
    assert captured.out.startswith("a title")
    assert "sdpa_16h" in captured.out
    assert captured.err == ""
