"""Tables in Markdown: what stands in them for records made up here, and that every committed record has one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from markdown_it import MarkdownIt

from mlakit.cli.main import main
from mlakit.cli.report import _VALUES
from mlakit.report.grid import Shown, TableOptions
from mlakit.report.load import LoadedRecord, Measurement, Session, load_records
from mlakit.report.markdown import escape, markdown_report

RECORDS = sorted((Path(__file__).parents[2] / "results").rglob("*.json"))
SESSION = Session(
    environment={"device": {"name": "a GPU"}, "torch": "2.13", "triton": "3.7"}, started="2026-11-22T05:00:00+00:00"
)


def row(backend: str, seconds: float | None, job: str = "8q1s1k", **fields) -> Measurement:
    return Measurement(operation=fields.pop("operation", "decode"), job=job, backend=backend, seconds=seconds, **fields)


def record(*rows: Measurement, **fields) -> LoadedRecord:
    return LoadedRecord(Path("r.json"), "mlakit.speed/1", "r", (SESSION,), rows, **fields)


def table(text: str) -> list[list[str]]:
    """The cells of the first table, header first, without the line of dashes."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def test_jobs_are_rows_and_backends_columns():
    rows = [row("a", 1.234e-5), row("b", 2e-5), row("b", 5e-3, "q2k")]
    text = markdown_report([record(*rows)])
    assert table(text) == [["µs", "a", "b"], ["8q1s1k", "**12.3**", "20.0"], ["q2k", "", "5000"]]
    assert text.splitlines()[1] == "| -- | --: | --: |"
    assert text.endswith("\na GPU, torch 2.13, triton 3.7, 2026-11-22.\n")


# The unit is that of the slowest cell; each cell has three digits of it, or all before the point.
@pytest.mark.parametrize(
    ("seconds", "unit", "cells"),
    [
        ((2.5e-6, 9.9e-3), "µs", ["**2.50**", "9900"]),
        ((2.5e-6, 1.1e-2), "ms", ["**0.00250**", "11.0"]),
        ((0.5, 12.0), "s", ["**0.500**", "12.0"]),
    ],
)
def test_one_unit_for_a_table(seconds, unit, cells):
    assert table(markdown_report([record(row("a", seconds[0]), row("b", seconds[1]))]))[0][0] == unit
    assert table(markdown_report([record(row("a", seconds[0]), row("b", seconds[1]))]))[1][1:] == cells


def test_what_is_not_told_from_the_fastest_is_bold_too():
    rows = [
        row("fastest", 10e-6, interval=(9e-6, 11e-6)),
        row("near", 11.5e-6, interval=(10.9e-6, 12e-6)),
        row("far", 11.6e-6, interval=(11.1e-6, 12e-6)),
        row("same digits", 10.001e-6),
    ]
    assert table(markdown_report([record(*rows)]))[1] == ["8q1s1k", "**10.0**", "**11.5**", "11.6", "**10.0**"]
    assert table(markdown_report([record(row("alone", 1e-5))]))[1] == ["8q1s1k", "10.0"]


def test_a_baseline_has_a_column_and_a_sentence():
    rows = [row("ours", 1e-5), row("other", 2e-5), row("peer", 1.5e-5), row("worse peer", 3e-5)]
    rows += [row("ours", 2e-5, "q2k"), row("peer", 1e-5, "q2k"), row("ours", 1e-5, "q4k")]
    text = markdown_report([record(*rows)], TableOptions(baseline=("peer", "worse peer")))
    assert [line[-1] for line in table(text)] == ["times the speed", "1.50", "0.50", ""]
    said = "The fastest other column has 0.50 to 1.50 times the speed of the fastest of peer, worse peer; "
    assert said + "geometric mean 0.87." in text
    text = markdown_report([record(row("ours", 1e-6), row("peer", 25e-6))], TableOptions(baseline=("peer",)))
    assert "ours has 25.0 to 25.0 times the speed of peer; geometric mean 25.0." in text


def test_a_column_may_be_the_fastest_of_several():
    rows = [row("graph", 1e-5), row("eager", 2e-5), row("eager", 3e-5, "q2k"), row("left out", 1e-6)]
    options = TableOptions(columns={"ours": ("eager", "graph"), "there": ("graph",)})
    assert table(markdown_report([record(*rows)], options)) == [
        ["µs", "ours", "there"],
        ["8q1s1k", "**10.0**", "**10.0**"],
        ["q2k", "30.0", ""],
    ]


def test_what_has_no_time_says_why():
    rows = [row("a", 1e-5), row("b", None, status="timeout"), row("c", None, status="wrong")]
    assert table(markdown_report([record(*rows)]))[1] == ["8q1s1k", "10.0", "timed out", "wrong result"]


def test_what_a_reader_must_know_is_said():
    rows = [row("a", 1e-5, checked=False), row("b", 2e-5, checked=True, throttled=("sw_power_cap",), session=2)]
    sessions = [replace(SESSION, started=f"2026-11-2{day}") for day in (2, 3, 4)]
    found = replace(record(*rows, complete=False, planned=9), sessions=tuple(sessions))
    text = markdown_report([found])
    assert table(text)[1] == ["8q1s1k", "**10.0 (unchecked)**", "20.0"]
    assert "Not complete: 2 of 9 rows are measured." in text
    assert "The GPU was slowed down while 1 of 2 were timed: sw_power_cap." in text
    assert [line[-11:-1] for line in text.splitlines() if line.startswith("a GPU")] == ["2026-11-22", "2026-11-24"]


def test_jobs_and_columns_that_look_alike_are_told_apart():
    rows = [row("a", s, sizes={"heads": heads, "batch": 1}) for heads, s in ((16, 1e-5), (128, 2e-5))]
    labels = [line[0] for line in table(markdown_report([record(*rows)]))[1:]]
    assert labels == ["heads 16", "heads 128"]  # what both are is said below
    assert "All: 8q1s1k." in markdown_report([record(*rows)])
    # What is left of a name must be one.
    rows = [row("a", 1e-5, "concat"), row("a", 1e-5, "concat, sliced")]
    assert [line[0] for line in table(markdown_report([record(*rows)]))[1:]] == ["concat", "concat, sliced"]
    rows = [row("a", s, settings={"num_splits": n, "page": 64}) for n, s in ((1, 1e-5), (4, 2e-5))]
    assert table(markdown_report([record(*rows)]))[0] == ["µs", "a, num_splits 1", "a, num_splits 4"]


def test_rows_of_two_gpus_of_a_cluster_are_not_compared():
    rows = [row("a", 1e-5, place="GPU-1"), row("b", 2e-5, place="GPU-1"), row("b", 1.9e-5, place="GPU-2")]
    assert table(markdown_report([record(*rows)])) == [
        ["µs", "a", "b"], ["on GPU-1", "**10.0**", "20.0"], ["on GPU-2", "", "19.0"],
    ]  # fmt: skip
    assert table(markdown_report([record(*rows[:2], row("b", 3e-5, "q2k", place="GPU-2"))]))[1][0] == "8q1s1k"


def test_filters():
    rows = [row("a", 1e-5, f"{n}q1", sizes={"dtype": dtype}) for n, dtype in ((1, "bf16"), (2, "bf16"), (3, "fp8"))]
    rows.append(row("a", 1e-5, "1q1", operation="prefill"))
    shown = markdown_report([record(*rows)], TableOptions(operations=("decode",), select={"dtype": ("bf16",)}))
    assert [line[0] for line in table(shown)[1:]] == ["1q1", "2q1"]
    shown = markdown_report([record(*rows)], TableOptions(operations=("decode",), jobs=("[13]q1",)))
    assert [line[0] for line in table(shown)[1:]] == ["1q1", "3q1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TableOptions(operations=("decod",)), "no operation 'decod'; there are: decode"),
        (TableOptions(columns={"x": ("c",)}), "no backend 'c'; there are: a, b"),
        (TableOptions(baseline=("c",)), "no column for the baseline 'c'; there are: a, b"),
        (TableOptions(select={"dtyp": ("bf16",)}), "no size 'dtyp'; there are: dtype"),
        (TableOptions(jobs=("q9*",)), r"no row is left by jobs \('q9\*',\)"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    rows = [row("a", 1e-5, sizes={"dtype": "bf16"}), row("b", 1e-5, sizes={"dtype": "bf16"})]
    with pytest.raises(ValueError, match=message):
        markdown_report([record(*rows)], options)


@pytest.mark.parametrize(
    ("value", "unit", "cell"),
    [
        ("tflops", "TFLOP/s", "400"),
        ("bandwidth", "TB/s", "3.00"),
        ("memory", "MiB", "2.00"),
        ("host", "µs", "7.00"),
        ("limit", "of the limit", "50%"),
    ],
)
def test_other_values(value, unit, cell):
    only = row("a", 1e-3, flops=4e11, bytes=3e9, memory_bytes=2**21, host_seconds=7e-6, limit_seconds=5e-4)
    assert table(markdown_report([record(only)], TableOptions(value=value))) == [[unit, "a"], ["8q1s1k", cell]]
    bare = row("a", 1e-3)
    assert table(markdown_report([record(bare)], TableOptions(value=value)))[1] == ["8q1s1k", ""]


def test_memory_marks_nothing_as_fastest():
    rows = [row("a", 1e-3, memory_bytes=2**21), row("b", 2e-3, memory_bytes=2**20)]
    assert table(markdown_report([record(*rows)], TableOptions(value="memory")))[1] == ["8q1s1k", "2.00", "1.00"]


def test_several_operations_and_records_have_titles():
    one = record(row("a", 1e-5), row("a", 1e-5, operation="prefill", model="tiny"))
    text = markdown_report([one, replace(one, name="other")])
    assert [line for line in text.splitlines() if line.startswith("**")] == [
        "**r, decode**", "**r, prefill, tiny**", "**other, decode**", "**other, prefill, tiny**",
    ]  # fmt: skip
    assert text.count("a GPU") == 2  # once a record


def test_conclusions_and_differences_are_told():
    pairs = [{"first": "naive", "second": "fused", "phase": "decode", "relative": r} for r in (1e-3, 2.5e-3, None)]
    text = markdown_report([record(row("a", 1e-5), conclusions=("decode is faster",), differences=tuple(pairs))])
    assert "| naive and fused | 2.5e-03 |" in text
    assert "\n- decode is faster\n" in text
    only = markdown_report([record(row("a", 1e-5), conclusions=("faster",))], TableOptions(value="conclusions"))
    assert only == "- faster\n\na GPU, torch 2.13, triton 3.7, 2026-11-22.\n"
    with pytest.raises(ValueError, match="no record has conclusions"):
        markdown_report([record(row("a", 1e-5))], TableOptions(value="conclusions"))
    assert "faster" not in markdown_report(
        [record(row("a", 1e-5), conclusions=("faster",))], TableOptions(value="host")
    )


def test_words_of_a_record_are_words():
    nasty = "<script>|`x`*y*[z](http://z)\n# head &amp;"
    html = MarkdownIt().enable("table").render(markdown_report([record(row(nasty, 1e-5, nasty))]))
    assert html.count("<td") == 2
    for tag in ("<script", "<code", "<em", "<a ", "<h1"):
        assert tag not in html
    assert "&lt;script&gt;|`x`*y*[z](http://z) # head &amp;amp;" in html
    assert escape("flash_mla 8q1s1k_2q256") == "flash_mla 8q1s1k_2q256"  # readable as it is


def test_ways_to_time_are_columns(tmp_path):
    """`make bench-h200`'s timing.json: one call by several methods."""
    rows = [
        {"op": "timing", "job": "decode", "method": m, "median_s": s} for m, s in (("profiler", 1e-5), ("graph", 2e-5))
    ]
    content = {"schema": "mlakit.speed/1", "environment": {"device": {"name": "a GPU"}}, "rows": rows}
    (tmp_path / "timing.json").write_text(json.dumps(content))
    text = markdown_report(load_records([tmp_path / "timing.json"]))
    assert table(text) == [["µs", "profiler", "graph"], ["decode", "**10.0**", "20.0"]]


def test_the_command(capsys):
    layer = str(Path(__file__).parents[2] / "results" / "h200" / "layer.json")
    assert main(["report", layer, "--markdown", "--operations", "layer", "--value", "memory"]) == 0
    printed = capsys.readouterr()
    header = table(printed.out)[0]
    assert header[0] == "MiB"
    assert {"fused", "naive", "absorb"} <= set(header[1:])
    assert printed.err == ""
    assert get_args(Shown) == _VALUES
    for words, message in (
        (["report", layer, "--value", "memory"], "--operations and --value go with --markdown"),
        (["report", layer, "--markdown", "--operations", "decode"], "no operation 'decode'; there are: layer"),
        (["report", "--update", "README.md", "--value", "host"], "--update takes all else from the documents' markers"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_committed_record_has_tables(path):
    records = load_records([path])
    text = markdown_report(records)
    shown = {cell.strip("*") for line in text.splitlines() if line.startswith("|") for cell in line.split(" | ")[1:]}
    assert len(shown) > 3
    assert records[0].sessions[0].device in text
