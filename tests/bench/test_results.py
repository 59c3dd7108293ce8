import json
import math
import os
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import (
    SCHEMA,
    STATUS_WORDS,
    BenchmarkResult,
    CheckRow,
    GpuState,
    LimitRow,
    Record,
    Session,
    Status,
    TimingRow,
)


def timing(median: float = 2e-3) -> TimingRow:
    return TimingRow(
        median=median,
        mean=median * 1.125,
        std=median * 0.25,
        min=median * 0.5,
        max=median * 2,
        p20=median * 0.75,
        p80=median * 1.5,
        ci95=(median * 0.875, median * 1.25),
        samples=[median * 0.5, median, median * 2],
    )


def result(backend: str = "sdpa", batch_spec: str = "8q1s1k", **fields: Any) -> BenchmarkResult:
    config = BenchmarkConfig.model_validate({"backend": backend, "batch_spec": batch_spec, "model": "tiny"})
    return BenchmarkResult(config=config, **fields)


def full_row() -> BenchmarkResult:
    """A row with everything that a row can have."""
    return result(
        backend_version="torch 2.13.0",
        modes={"decode": "mqa", "prefill": "mha"},
        timing=timing(),
        check=CheckRow(
            max_error=1e-3,
            max_error_allowed=2e-3,
            rms_error=1e-4,
            rms_error_allowed=2e-4,
            cosine_distance=1e-7,
            lse_error=1e-5,
        ),
        limit=LimitRow(flops=10**15, bytes=2**40, seconds=5e-4, bound="memory"),
        memory_allocated_mb=12.5,
        memory_reserved_mb=20.0,
        memory_temporary_mb=0.5,
        gpu=GpuState(sm_clock=1980, memory_clock=2619, power=612.5, temperature=61, throttle_reasons=["sw_power_cap"]),
        started="2026-01-02T03:04:05+00:00",
        seconds=1.5,
        session=1,
    )


def full_record() -> Record:
    session = Session(
        started="2026-01-02T03:04:05+00:00",
        command=["mlakit", "bench", "--config", "quickstart"],
        environment={"device": {"name": "a CPU", "kind": "cpu"}},
        ceilings={"fp32": {"flops_per_s": 1e11}},
    )
    failed = result("torch_naive", status="timeout", error="no answer in 300 s: “µ”")
    return Record(
        name="mine", description="all of it", planned=3, sessions=[session, session], rows=[full_row(), failed]
    )


# --- a row ---


def test_derived_figures():
    row = full_row()
    assert row.success
    assert (row.median_time, row.mean_time, row.std_time) == pytest.approx((2e-3, 2.25e-3, 5e-4))
    assert (row.min_time, row.max_time) == (1e-3, 4e-3)
    assert row.throughput_tokens_per_sec == pytest.approx(8 / 2e-3)  # 8 requests of one new token
    assert row.fraction_of_limit == pytest.approx(0.25)


def test_throughput_counts_new_tokens_alone():
    assert result(batch_spec="2q4s1k_q8", timing=timing(0.5)).throughput_tokens_per_sec == pytest.approx(16 / 0.5)


DERIVED = (
    "mean_time", "median_time", "std_time", "min_time", "max_time", "throughput_tokens_per_sec", "fraction_of_limit",
)  # fmt: skip


@pytest.mark.parametrize("status", sorted(set(get_args(Status)) - {"ok"}))
def test_a_row_without_a_time_has_no_figures(status):
    row = result(status=status, error="reason")
    assert not row.success
    assert [getattr(row, name) for name in DERIVED] == [None] * len(DERIVED)
    assert STATUS_WORDS[row.status]


def test_a_time_without_a_limit_has_no_fraction():
    assert result(timing=timing()).fraction_of_limit is None
    assert result(limit=full_row().limit).fraction_of_limit is None


def test_to_dict_is_plain_and_has_the_derived_figures():
    found = full_row().to_dict()
    assert json.loads(json.dumps(found)) == found
    assert {name: found[name] for name in DERIVED} == {name: getattr(full_row(), name) for name in DERIVED}
    assert found["success"] is True
    assert found["config"]["backend"] == "sdpa"
    assert found["gpu"]["throttle_reasons"] == ["sw_power_cap"]
    assert result(status="crashed").to_dict()["success"] is False


def test_every_status_has_its_word():
    assert set(STATUS_WORDS) == set(get_args(Status))
    assert len(set(STATUS_WORDS.values())) == len(STATUS_WORDS)


# --- the file ---


def test_round_trip(tmp_path):
    record = full_record()
    path = tmp_path / "deep" / "er" / "record.json"  # folders are made
    record.save(path)
    loaded = Record.load(path)
    assert loaded == record
    assert [row.config.key for row in loaded.rows] == [row.config.key for row in record.rows]
    loaded.save(path)
    assert Record.load(path) == record


@given(st.floats(1e-9, 1e6), st.text(max_size=20), st.integers(0, 2**63))
def test_round_trip_is_exact(tmp_path_factory, median, error, flops):
    row = result(timing=timing(median), error=error, limit=LimitRow(flops=flops, bytes=1, seconds=1, bound="compute"))
    record = full_record().model_copy(update={"rows": [row]})
    path = tmp_path_factory.getbasetemp() / "exact.json"
    record.save(path)
    assert Record.load(path) == record


def test_a_record_of_nothing_yet(tmp_path):
    record = full_record().model_copy(update={"rows": []})
    record.save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json") == record


def test_what_the_file_holds(tmp_path):
    full_record().save(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["record_schema"] == SCHEMA
    assert (content["name"], content["planned"], content["complete"]) == ("mine", 3, False)
    # Derived figures are there for whoever reads the file without mlakit.
    assert content["rows"][0]["median_time"] == 2e-3
    assert content["rows"][0]["fraction_of_limit"] == pytest.approx(0.25)
    assert content["rows"][1]["error"] == "no answer in 300 s: “µ”"


def _changed(change):
    content = {**full_record().model_dump(mode="json"), "rows": [full_row().to_dict()]}
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    # No JSON, half of it as a disk that ran full leaves, JSON of another kind, another schema, none, and one thing
    # wrong at each depth of a record.
    [
        ("", "is no JSON: "),
        ("{not json", "is no JSON: "),
        (_changed(lambda c: None)[:-20], "is no JSON: "),
        ("[]", f"is no record of this mlakit: expected schema {SCHEMA}, got None"),
        ("3", f"is no record of this mlakit: expected schema {SCHEMA}, got None"),
        ("{}", f"is no record of this mlakit: expected schema {SCHEMA}, got None"),
        (_changed(lambda c: c.update(record_schema="mlakit.bench/2")), f"expected schema {SCHEMA}, got mlakit.bench/2"),
        (_changed(lambda c: c.pop("rows")), "malformed record: : KeyError('rows')"),
        (_changed(lambda c: c.update(rows=3)), "malformed record: : TypeError"),
        (_changed(lambda c: c.update(rows=["row"])), "malformed record: : AttributeError"),
        (_changed(lambda c: c.pop("planned")), "malformed record: planned: Field required"),
        (_changed(lambda c: c.update(planed=3)), "malformed record: planed: Extra inputs are not permitted"),
        (_changed(lambda c: c["rows"][0].pop("config")), "malformed record: rows.0.config: Field required"),
        (_changed(lambda c: c["rows"][0].update(status="fine")), "malformed record: rows.0.status: Input should be"),
        (
            _changed(lambda c: c["rows"][0]["timing"].pop("ci95")),
            "malformed record: rows.0.timing.ci95: Field required",
        ),
        (_changed(lambda c: c["rows"][0]["config"].update(batch_spec="q0")), "malformed record: rows.0.config: "),
        (_changed(lambda c: c["rows"][0]["limit"].update(bound="both")), "malformed record: rows.0.limit.bound: "),
        (_changed(lambda c: c["sessions"][1].pop("environment")), "malformed record: sessions.1.environment: "),
    ],
)
def test_load_errors_name_the_file_and_the_place(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is what is tested
        Record.load(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_load_of_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json: No such file or directory"):
        Record.load(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="Is a directory"):
        Record.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="binary is no JSON"):
        Record.load(tmp_path / "binary")


# --- in one step ---


@pytest.mark.parametrize("step", ["fdopen", "fsync", "chmod", "replace"])
# An error of the disk's, and an interruption, which is no Exception.
@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, step, failure):
    path = tmp_path / "r.json"
    record = full_record()
    record.save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(os, step, fail)
        with pytest.raises(type(failure)):
            record.model_copy(update={"rows": []}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]  # and nothing half-written beside it


def test_infinite_errors_become_null(tmp_path):
    # What a wrong result's error can be, and JSON has no word for.
    check = CheckRow(
        max_error=math.inf, max_error_allowed=0.0, rms_error=math.inf, rms_error_allowed=0.0, cosine_distance=1.0
    )
    record = full_record().model_copy(update={"rows": [result(status="wrong", check=check)]})
    record.save(tmp_path / "r.json")
    loaded = Record.load(tmp_path / "r.json")
    assert loaded == record
    assert loaded.rows[0].check is not None
    assert loaded.rows[0].check.max_error is None
    assert loaded.rows[0].check.cosine_distance == 1.0


def test_a_record_loads_where_its_backend_is_not_installed(tmp_path):
    record = full_record()
    record.save(tmp_path / "r.json")
    name = record.rows[0].config.backend
    text = (tmp_path / "r.json").read_text().replace(f'"backend": "{name}"', '"backend": "somebody_elses"')
    assert "somebody_elses" in text
    (tmp_path / "r.json").write_text(text)
    assert "somebody_elses" in {row.config.backend for row in Record.load(tmp_path / "r.json").rows}
