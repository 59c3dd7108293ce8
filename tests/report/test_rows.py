"""What the page is told: names that tell rows and jobs apart, warnings, ceilings."""

import pytest

from mlakit.bench.results import GpuState, Place, Session
from mlakit.bench.units import three
from mlakit.report.circumstances import brief, environments, warnings
from mlakit.report.grid import TableOptions
from mlakit.report.load import load_record, load_records
from mlakit.report.markdown import markdown_report
from mlakit.report.rows import entries_of, page_data
from tests.support.reports import CEILINGS, PARALLEL, RESULTS, bench_row


def labels(*records):
    return [entry.label for entry in entries_of(records)]


def test_rows_of_one_job_have_names_of_their_own(make_record):
    a, b = bench_row(), bench_row(cuda_graph=True)
    assert labels(make_record(a, b)) == ["sdpa (cuda_graph False)", "sdpa (cuda_graph True)"]
    # Alike in all but where they are from; and without need, nothing is added.
    assert labels(make_record(a), make_record(a, name="other")) == ["sdpa (mine)", "sdpa (other)"]
    assert labels(make_record(a, bench_row(spec="q64"))) == ["sdpa", "sdpa"]
    assert labels(make_record(a, a)) == ["sdpa", "sdpa (2)"]


def test_jobs_of_one_name_are_told_apart_in_few_words(make_record):
    rows = [bench_row(num_q_heads=16), bench_row(num_q_heads=32), bench_row(spec="q64")]
    titles = [job["title"] for job in page_data([make_record(*rows)])["jobs"]]
    assert titles == ["8q1s1k · heads 16", "8q1s1k · heads 32", "q64"]
    here, there = make_record(rows[0]), make_record(rows[0], device="another")
    data = page_data([here, there])
    # On two devices it is two jobs: their times are not compared.
    assert [job["title"] for job in data["jobs"]] == ["8q1s1k · a GPU", "8q1s1k · another"]
    assert [roof["device"] for roof in data["roofs"]] == ["a GPU", "another"]


def test_a_job_of_the_committed_records_has_one_title_and_each_of_its_rows_one_name():
    data = page_data([load_record(path) for path in sorted(RESULTS.glob("*.json"))])
    titles = [(job["operation"], job["title"]) for job in data["jobs"]]
    assert len(set(titles)) == len(titles)
    names = [(row["job"], row["backend"]) for row in data["rows"]]
    assert len(set(names)) == len(names)
    first = [name for name in data["operations"] if name in ("attention", "mla_decode", "mla_prefill", "concat_k")]
    assert first == ["attention", "mla_decode", "mla_prefill", "concat_k"]  # not by the names of the files


def test_rows_of_two_gpus_of_a_cluster_are_two_jobs(make_record):
    places = [Place(node="n", gpu=f"GPU-{number}") for number in (1, 1, 2)]
    rows = [bench_row(name).model_copy(update={"place": place}) for name, place in zip("aba", places, strict=True)]
    data = page_data([make_record(*rows)])
    assert [job["title"] for job in data["jobs"]] == ["8q1s1k · GPU-1", "8q1s1k · GPU-2"]
    assert [(row["job"], row["backend"]) for row in data["rows"]] == [(0, "a"), (0, "b"), (1, "a")]


def test_rows_that_are_no_jobs_are_mentioned():
    record = load_record(RESULTS / "layer.json")
    assert record.left_out
    (name,) = record.left_out
    assert f"layer: {record.left_out[name]} rows of layer_kernels, the kernels inside calls, are not shown" in "".join(
        warnings([record])
    )


def test_baseline_and_rows_must_be_there(make_record):
    with pytest.raises(ValueError, match=r"--baseline: no row of 'fa9'; the records have: sdpa, flashmla"):
        page_data([make_record(bench_row(), bench_row("flashmla"))], "fa9")
    with pytest.raises(ValueError, match=r"nothing to report: no rows in .*json"):
        page_data([make_record(complete=False, planned=4)])


def test_curves_become_thresholds(make_record):
    rows = [
        bench_row(spec=f"4q{q}s1k", median=time, pipeline=pipeline, label=f"sdpa_{pipeline}")
        for q, decode, prefill in ((2, 1e-3, 3e-3), (8, 2e-3, 3e-3), (32, 5e-3, 3e-3))
        for pipeline, time in (("decode", decode), ("prefill", prefill))
    ]
    data = page_data([make_record(*rows, mode="decode_vs_prefill")])
    (found,) = data["thresholds"]
    assert (found["backend"], found["batch"], found["keys"], found["threshold"]) == ("sdpa", 4, 1024, 8)
    assert found["longest"] is False
    assert any("decode is faster up to q_len 8" in line for line in data["conclusions"][0]["lines"])


def test_nothing_to_warn_of_gives_no_warning(make_record):
    assert warnings([make_record(bench_row(), bench_row("flashmla"))]) == []


def test_every_circumstance_has_its_warning(make_record):
    throttled = GpuState(sm_clock=1200, throttle_reasons=["hardware thermal slowdown"])
    capped = GpuState(sm_clock=1980, throttle_reasons=["software power cap"])
    cases = {
        "incomplete, 1 of 9 rows measured": make_record(bench_row(), planned=9, complete=False),
        "1 row gave a wrong result and got no time: sdpa on 8q1s1k": make_record(
            bench_row(), bench_row("sdpa", "q64", None, status="wrong"), bench_row(median=None, status="wrong")
        ),
        "thermal: the GPU held itself back (hardware thermal slowdown) in 1 row": make_record(bench_row(gpu=throttled)),
        "throttled: the GPU held itself back (software power cap) in 1 row": make_record(bench_row(gpu=capped)),
        "clocks differ between rows: 1200 to 1980 MHz": make_record(
            bench_row(gpu=GpuState(sm_clock=1200)), bench_row(spec="q64", gpu=GpuState(sm_clock=1980))
        ),
        "1 row timed without a check of the result": make_record(bench_row(checked=False)),
        "noisy: the 95% interval of 1 row is wider than ±10%": make_record(bench_row(spread=0.2)),
        "measured with changes that were not committed": make_record(
            bench_row(), environment={"commit": "abc+dirty"}
        ),
    }  # fmt: skip
    cases["2 rows gave a wrong result"] = cases.pop("1 row gave a wrong result and got no time: sdpa on 8q1s1k")
    for expected, record in cases.items():
        assert any(line.startswith(f"mine: {expected}") for line in warnings([record])), (expected, warnings([record]))


def test_machines_and_software_that_differ_are_named(make_record):
    a = make_record(bench_row(), environment={"driver": "1"})
    b = make_record(bench_row(), device="another", environment={"driver": "1", "torch": "2.13"})
    machines, software = warnings([a, b])
    threads = [make_record(bench_row(), environment={"threads": n}) for n in (1, 2)]
    assert warnings(threads) == []  # of the host of a GPU, they say nothing
    host = {"device": {"kind": "cpu", "name": "a CPU"}}
    threads = [make_record(bench_row(), environment={**host, "threads": n}) for n in (1, 2)]
    assert warnings(threads) == ["Machines differ between the records, compare them with care: CPU threads 1 and 2"]
    assert machines == "Machines differ between the records, compare them with care: device a GPU and another"
    assert software == "Software differs between the records, compare them with care: torch 2.11 and 2.13"
    columns = environments([a, b, a])
    assert [column.texts["device"] for column in columns] == ["a GPU", "another"]
    assert [column.records for column in columns] == [["mine"], ["mine"]]
    assert columns[0].texts["bf16 ceiling"] == "800 TFLOP/s"


def test_sessions_that_differ_in_their_ceilings_alone_share_a_column(make_record):
    def sitting(torch: str, flops: float) -> Session:
        ceilings = {"bf16": {**CEILINGS, "dtype": "bfloat16", "flops_per_s": flops}}
        environment = {"device": {"name": "a GPU"}, "torch": torch}
        return Session(started="2026-11-23T08:00:00+00:00", environment=environment, ceilings=ceilings)

    record = make_record(bench_row(), sessions=[sitting("2.11", 8e14), sitting("2.11", 7e14), sitting("2.13", 8e14)])
    one, other = environments([record])
    assert one.texts["bf16 ceiling"] == "700 TFLOP/s to 800 TFLOP/s"
    assert one.texts["memory ceiling"] == "4.00 TB/s"
    assert other.texts["torch"] == "2.13"
    line = "torch differs, memory ceiling 4.00 TB/s, bf16 ceiling 700 TFLOP/s to 800 TFLOP/s"
    assert brief([one, other]) == line


def test_records_of_one_name_are_told_apart(make_record, tmp_path):
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    for path in paths:
        make_record(bench_row(), name="quickstart").path.rename(path)
    found = load_records(paths)
    assert [record.name for record in found] == ["before", "after"]
    assert labels(*found) == ["sdpa (before)", "sdpa (after)"]
    assert (
        len({record.name for record in load_records([paths[0], tmp_path / ".." / tmp_path.name / "before.json"])}) == 2
    )


def test_what_was_predicted_is_told_and_is_not_the_fastest():
    record = load_record(PARALLEL)
    rows = [row for row in record.rows if row.job == "q1s1024k" and row.operation == "attention over ranks"]
    times = {predicted: min(r.seconds or 1.0 for r in rows if r.predicted is predicted) for predicted in (True, False)}
    assert times[True] < times[False]  # on more ranks than there were
    assert {row["predicted"] for row in page_data([record])["rows"]} == {True, False}
    table = markdown_report([record], TableOptions(operations=("attention over ranks",)))
    bold = [cell for line in table.splitlines()[2:] for cell in line.split("|") if "**" in cell]
    assert bold[0].strip() == f"**{three(times[False] * 1e6)}**"
