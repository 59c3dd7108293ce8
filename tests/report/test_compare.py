"""Pairing, outcomes, warnings and what is shown and saved, on records made here and on the committed ones."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import BenchmarkResult, GpuState, Record, Session, TimingRow
from mlakit.cli.main import main
from mlakit.report import compare_ratio
from mlakit.report.compare import compare_records
from mlakit.report.compare_show import print_comparison
from mlakit.report.load import load_record

RESULTS = Path(__file__).parents[2] / "results" / "h200"
ENVIRONMENT = {"device": {"name": "a GPU"}, "driver": "1", "torch": "2.13.0", "triton": "3.7.1", "commit": "abc"}


def row(backend: str = "sdpa", median: float | None = 1e-3, status: str = "ok", **fields: Any) -> BenchmarkResult:
    gpu = GpuState(sm_clock=fields.pop("clock", 1980), throttle_reasons=fields.pop("throttled", []))
    version = fields.pop("version", "1.0")
    config = BenchmarkConfig.model_validate({"model": "tiny", "batch_spec": "8q1s1k", "backend": backend, **fields})
    if median is None:
        return BenchmarkResult(config=config, status=status if status != "ok" else "wrong", error="off by one")
    samples = (median * np.exp(0.01 * np.random.default_rng(len(backend)).standard_normal(30))).tolist()
    at = {"median": median, "mean": median, "std": 0, "min": median, "max": median, "p20": median, "p80": median}
    timing = TimingRow(**at, ci95=(median * 0.99, median * 1.01), samples=samples)
    return BenchmarkResult(config=config, timing=timing, gpu=gpu, backend_version=version)


def write(path: Path, *rows: BenchmarkResult, complete: bool = True, ceilings: float = 1e12, **environment: Any) -> str:
    measured = {"bf16": {"dtype": "bfloat16", "device": "a GPU", "copy_bytes_per_s": ceilings,
                         "read_bytes_per_s": ceilings, "flops_per_s": 1e14}}  # fmt: skip
    session = Session(
        started="2026-11-22T09:00:00+00:00", environment={**ENVIRONMENT, **environment}, ceilings=measured
    )
    Record(name=path.stem, planned=len(rows), complete=complete, sessions=[session], rows=list(rows)).save(path)
    return str(path)


@pytest.fixture
def compared(tmp_path, capsys):
    """Runs the command on two lists of rows; returns exit code, output and errors."""

    def run(before, after, *flags, **environment):
        a, b = write(tmp_path / "a.json", *before), write(tmp_path / "b.json", *after, **environment)
        code = main(["compare", a, b, *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_every_outcome(compared, tmp_path):
    before = [row("sdpa"), row("flash"), row("cudnn"), row("triton"), row("flex", None), row("flashmla")]
    after = [row("sdpa", 1.2e-3), row("flash", 0.5e-3), row("cudnn", 1.001e-3), row("triton", None),
             row("flex"), row("torch_naive")]  # fmt: skip
    code, out, err = compared(before, after, "--output-json", str(tmp_path / "c.json"))
    assert code == 0  # nobody asked to fail
    found = json.loads((tmp_path / "c.json").read_text())
    outcomes = {pair["backend"]: pair["outcome"] for pair in found["pairs"]}
    assert outcomes == {"sdpa": "SLOWER", "flash": "FASTER", "cudnn": "SAME", "triton": "LOST", "flex": "GAINED"}
    slower = found["pairs"][0]
    assert slower["ratio"] == pytest.approx(1.2)
    assert 1.18 < slower["interval"][0] < 1.2 < slower["interval"][1] < 1.22
    assert slower["basis"] == "samples"
    assert slower["a"]["samples"] == 30
    assert [r["backend"] for r in found["only_a"]] == ["flashmla"]
    assert [r["backend"] for r in found["only_b"]] == ["torch_naive"]
    (line,) = [line.split() for line in out.splitlines() if line.endswith("FASTER")]
    assert line[:6] == ["flash", "1.00", "ms", "500", "µs", "0.500"]
    assert "triton: no time in B, wrong result: off by one" in out
    assert "only in A: attention by flashmla: 8q1s1k" in out
    assert "only in B: attention by torch_naive: 8q1s1k" in out
    assert "5 pairs: 1 slower, 1 lost their time, 1 faster, 1 the same, 1 gained one" in out
    assert "warning" not in err
    assert "not drift from one run to the other" in err


@pytest.mark.parametrize(
    ("after", "limit", "code"),
    # Slower by 20%: above 5% and 15% by all of its interval, above 19.9% by a part of it, above 25% not at all.
    [(1.2e-3, "5%", 1), (1.2e-3, "15%", 1), (1.2e-3, "19.9%", 0), (1.2e-3, "25%", 0), (0.8e-3, "0%", 0),
     (1.0e-3, "0%", 0), (None, "50%", 1)],
)  # fmt: skip
def test_the_gate(compared, after, limit, code):
    found, _, err = compared([row(), row("flash")], [row(median=after), row("flash")], "--fail-above", limit)
    assert found == code
    assert ("mlakit: regression: 8q1s1k, sdpa" in err) == bool(code)


def test_what_is_missing_or_not_for_this_machine_fails_no_gate(compared):
    gone = [row("flash"), row("sdpa", None, "unavailable")]
    assert compared([row("flash"), row("sdpa"), row("cudnn")], gone, "--fail-above", "5%")[0] == 0


def test_rows_are_paired_by_what_was_measured(compared):
    """Batch, dtype, L2, layers and parameters tell rows apart; repeats, seed and patience do not."""
    told = [{"batch_spec": "q64"}, {"dtype": "fp16"}, {"l2": "hot"}, {"num_layers": 2}, {"parameters": {"chunk": 3}}]
    before = [row(**fields, repeats=3, seed=1, timeout=5.0) for fields in told]
    after = [row(median=1e-3 * (i + 2), **fields) for i, fields in enumerate(told)]
    _, out, _ = compared(before, after[::-1])
    ratios = [line.split()[-5] for line in out.splitlines() if line.endswith("SLOWER")]
    assert ratios == ["2.000", "3.000", "4.000", "5.000", "6.000"]
    assert "8q1s1k, dtype fp16" in out.replace("model tiny, ", "")
    assert "l2 hot" in out
    assert "num_layers 2" in out
    assert "chunk 3" in out


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"device": {"name": "another"}}, "the device differs: a GPU in A, another in B"),
        ({"driver": "2"}, "the driver differs: 1 in A, 2 in B"),
        ({"triton": "3.6.0"}, "the version of triton differs: 3.7.1 in A, 3.6.0 in B"),
        ({"ceilings": 0.9e12}, "its own copy reached 1.00 TB/s in A, 900 GB/s in B"),
        ({"complete": False}, "B is not complete"),
    ],
)
def test_what_else_differs_is_a_warning(compared, environment, words):
    code, out, err = compared([row()], [row()], **environment)
    (line,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert words in line
    assert "warning" not in out
    assert code == 0


def test_clocks_throttling_and_versions_of_rows(compared):
    after = [row(clock=1700, throttled=["software power cap"], version="1.1"), row("flash")]
    _, _, err = compared([row(), row("flash")], after)
    assert "the GPU's clock differs in 1 of 2 rows, at most 1980 MHz in A, 1700 in B" in err
    assert "slowed down in 1 of 2 rows of B: software power cap" in err
    assert "the version of sdpa differs: 1.0 in A, 1.1 in B" in err


def test_the_commit_may_differ_without_a_word(compared):
    assert "warning" not in compared([row()], [row()], commit="def")[2]


def test_quiet(compared):
    _, _, err = compared([row()], [row()], "--quiet", driver="2")
    assert err.splitlines() == ["warning: the driver differs: 1 in A, 2 in B"]


def test_csv(compared, tmp_path):
    path = tmp_path / "deep" / "c.csv"
    compared([row(), row("flash")], [row(median=2e-3), row("cudnn")], "--output-csv", str(path))
    lines = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [(line["backend"], line["outcome"]) for line in lines] == [
        ("sdpa", "SLOWER"), ("flash", "ONLY IN A"), ("cudnn", "ONLY IN B"),
    ]  # fmt: skip
    assert float(lines[0]["ratio"]) == pytest.approx(2.0)
    assert float(lines[0]["ratio_low"]) < 2 < float(lines[0]["ratio_high"])
    assert lines[0]["dtype"] == "bf16"
    assert (lines[1]["b_seconds"], lines[2]["a_seconds"]) == ("", "")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_record_compares_with_itself(path, monkeypatch):
    monkeypatch.setattr(compare_ratio, "_RESAMPLES", 100)  # what is paired is the same, in less time
    record = load_record(path)
    comparison = compare_records(record, record)
    assert len(comparison.pairs) == len(record.rows)
    assert not comparison.only_a
    assert not comparison.only_b
    # Nothing differs; that the GPU was slowed down, where it was, is said all the same.
    assert all(line.startswith("the GPU was slowed down in ") for line in comparison.warnings)
    assert all(pair.before is pair.after for pair in comparison.pairs)
    assert {pair.ratio.value for pair in comparison.pairs if pair.ratio} <= {1.0}
    assert not comparison.counts["SLOWER"] + comparison.counts["FASTER"]


def test_records_without_samples_say_so(capsys):
    path = str(RESULTS / "prefill.json")
    assert main(["compare", path, path, "--fail-above", "1%"]) == 0
    assert "bootstrapped from the recorded medians and their 95% intervals" in capsys.readouterr().err


@pytest.mark.parametrize("width", [48, 80, 120])
def test_it_fits_a_terminal(tmp_path, width):
    a = load_record(Path(write(tmp_path / "a.json", row(), row("torch_absorb"))))
    b = load_record(Path(write(tmp_path / "b.json", row(median=2e-3), row("torch_absorb"))))
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, no_color=True)
    print_comparison(console, compare_records(a, b))
    out = re.sub(r"\x1b\[[012]m", "", text.getvalue())
    assert "\x1b" not in out  # bold, dim, and no colour
    table = out[out.index("job ") : out.index("2 pairs")].splitlines()
    assert all(len(line) <= width for line in table)
    assert ("95% interval" in table[0]) == (width >= 80)
    assert table[2].rstrip().endswith("SLOWER")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected two records, A and B (or --worktree REV), got 0"),
        (["a.json"], "got 1"),
        (["a.json", "no.json"], "no.json: No such file"),
        (["a.json", "b.json", "--fail-above", "5"], "--fail-above: expected a percentage such as 5%, got '5'"),
        (["a.json", "b.json", "--fail-above", "-5%"], "expected"),
        (["a.json", "b.json", "--same-within", "much%"], "--same-within: expected a percentage such as 5%"),
        (["a.json", "b.json", "--output-csv", "."], "is a folder"),
        (["a.json", "other.json"], "nothing to compare: no row of a.json measured what a row of other.json did"),
        (["a.json", "b.json", "--backend", "sdpa"], "go with --worktree REV"),
        (["a.json", "b.json", "--rounds", "9"], "go with --worktree REV"),
        (["a.json", "b.json", "--worktree", "HEAD"], "not both"),
        (["--worktree", "HEAD"], "no batch to measure"),
        (["--worktree", "HEAD", "--rounds", "5", "--batch-specs", "q64"], "--rounds: expected at least 6"),
        (["--worktree", "no-such-rev", "--batch-specs", "q64"], "git knows no revision 'no-such-rev'"),
        (["--worktree", "--help-me", "--batch-specs", "q64"], "expected one argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write(Path(f"{name}.json"), row())
    write(Path("other.json"), row("flash"))
    with pytest.raises(SystemExit) as end:
        main(["compare", *arguments])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("mlakit: error: ")
    assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "other.json"]
