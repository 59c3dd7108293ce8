"""Reading records: every kind into one form, and one clear line for what is none."""

import json
import re
from pathlib import Path

import pytest

from mlakit.report import load
from mlakit.report.load import load_record, load_records
from mlakit.report.load_studies import READERS

RESULTS = Path(__file__).parents[2] / "results" / "h200"
RECORDS = sorted(RESULTS.glob("*.json"))


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_committed_record_loads(path):
    record = load_record(path)
    assert record.rows
    assert record.sessions[0].device == "NVIDIA H200"
    timed = [row for row in record.rows if row.seconds]
    assert timed or all(row.reason for row in record.rows)
    # A time outside its own interval, or faster than the device can be, means that a unit was misread. (Some jobs run
    # from the L2 cache, faster than memory; none by half.)
    assert all(row.interval[0] <= row.seconds * 1.001 and row.seconds <= row.interval[1] * 1.001
               for row in timed if row.interval)  # fmt: skip
    assert all(row.fraction_of_limit < 1.5 for row in timed if row.fraction_of_limit)
    # Rows that are the same measurement by all that the record says of them, and no others. A recommendation measures
    # in rounds, which differ in their data alone.
    figures = ("median_s", "ci95_s", "host_s", "tb_per_s", "tflop_per_s", "ratio_to_peer", "temporary_bytes")
    source = [
        json.dumps({k: v for k, v in row.items() if k not in figures}, sort_keys=True)
        if record.schema == "mlakit.speed/1"
        else json.dumps({**row.get("config", row), "seed": None}, sort_keys=True)
        for row in json.loads(path.read_text())["rows"]
        if not row.get("op", "").endswith("_kernels")
    ]
    twice = len(source) - len(set(source))
    assert len(record.rows) - len({row.identity for row in record.rows}) == twice


def test_a_bench_row_keeps_what_the_record_says():
    record = load_record(RESULTS / "quickstart.json")
    source = json.loads((RESULTS / "quickstart.json").read_text())["rows"][0]
    row = record.rows[0]
    assert (row.job, row.backend, row.model) == ("32q1s4k", source["config"]["backend"], "deepseek-v3")
    assert (row.seconds, row.limit_seconds) == (source["timing"]["median"], source["limit"]["seconds"])
    assert row.fraction_of_limit == pytest.approx(source["fraction_of_limit"])
    assert len(row.samples) == len(source["timing"]["samples"])
    assert row.sizes["batch"] == 32
    assert row.sizes["keys"] == 4096
    assert row.checked is True
    assert record.sessions[0].ceilings["bf16"].flops_per_s > 1e14


def test_speed_rows_have_the_bytes_and_operations_that_their_rates_tell():
    record = load_record(RESULTS / "dense_decode.json")
    row = next(row for row in record.rows if row.job == "64x128x4096" and row.backend == "hopper")
    assert row.phase == "decode"
    # 64 requests of 4096 keys of 576 bfloat16, and little beside them.
    assert row.bytes == pytest.approx(64 * 4096 * 576 * 2, rel=0.1)
    assert row.flops == pytest.approx(2 * 64 * 128 * 4096 * (576 + 512), rel=1e-6)


def test_a_word_on_one_backends_result_makes_no_job_of_its_own():
    rows = [row for row in load_record(RESULTS / "dense_decode.json").rows if row.job.startswith("e4m3")]
    told = [row for row in rows if row.reason]
    assert {row.backend for row in told} == {"flash_mla", "flash_mla_metadata"}
    assert all(row.seconds for row in told)
    assert {row.comparison for row in told} <= {row.comparison for row in rows if row.backend == "hopper"}


def test_operations_in_float8_have_no_ceiling_in_bfloat16():
    for record, operation in (("quant", "fp8_gemm"), ("indexer", "indexer_logits")):
        products = [row for row in load_record(RESULTS / f"{record}.json").rows if row.operation == operation]
        assert products
        assert all(row.bound == "memory" for row in products)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema": "mlakit.speed/2", "rows": []}, "its schema is 'mlakit.speed/2', and this mlakit reads: "),
        ({"record_schema": "mlakit.bench/9"}, "its schema is 'mlakit.bench/9'"),
        ({"record_schema": "mlakit.bench/1", "name": "x"}, "malformed record"),
        ({"schema": "mlakit.speed/1", "environment": {}, "rows": [{"impl": "x"}]}, "malformed record of schema"),
        ({"schema": "mlakit.layers/1", "environment": {}}, "malformed record of schema mlakit.layers/1: KeyError: "),
        ({"schema": "mlakit.speed/1", "environment": None, "rows": []}, "environment: expected an object, got None"),
        ({"schema": ["a", "list"]}, "its schema is"),
        ({"a": 1}, "is no record of mlakit's: it names no schema"),
        ([1, 2], "is no record of mlakit's"),
    ],
)
def test_what_is_no_record_is_one_line_that_names_the_file(tmp_path, content, message):
    path = write(tmp_path / "given.json", content)
    with pytest.raises(ValueError, match=r"given\.json") as caught:
        load_record(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"gone.json: No such file"):
        load_record(tmp_path / "gone.json")
    (tmp_path / "half.json").write_text('{"schema": ')
    with pytest.raises(ValueError, match="is no JSON"):
        load_record(tmp_path / "half.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no JSON"):
        load_record(tmp_path / "bytes.json")
    with pytest.raises(ValueError, match="at least one record"):
        load_records([])


def test_what_is_no_number_is_no_time(tmp_path):
    nothing = {"median_s": float("nan"), "ci95_s": None, "tb_per_s": float("inf")}
    content = {"schema": "mlakit.speed/1", "environment": {}, "rows": [{"op": "x", "impl": "y", "row": "z", **nothing}]}
    (row,) = load_record(write(tmp_path / "a.json", content)).rows
    assert (row.seconds, row.bytes, row.status) == (None, None, "no time")


def test_a_device_without_a_name(tmp_path):
    for environment, name in (
        ({}, "unknown device"),
        ({"device": "a GPU"}, "a GPU"),
        ({"device": {}}, "unknown device"),
    ):
        content = {"schema": "mlakit.speed/1", "environment": environment, "rows": []}
        assert load_record(write(tmp_path / "a.json", content)).sessions[0].device == name


def test_every_record_that_is_written_can_be_read():
    source = Path(load.__file__).parents[1]
    written = {
        schema
        for path in [*source.glob("studies/*.py"), source / "bench" / "results.py"]
        for schema in re.findall(r'^SCHEMA\b.*= "(mlakit\.\w+/\d+)"', path.read_text(), re.MULTILINE)
    }
    assert len(written) > 5
    assert written <= {load.BENCH_SCHEMA, *READERS}
