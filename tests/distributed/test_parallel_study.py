"""`mlakit study parallel` on CPU ranks: what it writes, what it concludes, what it refuses."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from mlakit.distributed import launch
from mlakit.report.load import load_record
from mlakit.studies import parallel, parallel_parts, parallel_run
from mlakit.studies.parallel_report import Plan, Row, csv_text, findings, plans_of, table

ROOT = Path(__file__).parents[2]
QUICK = ["--device", "cpu", "--repeats", "1", "--l2", "hot"]


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Runs the study in this process, as the only rank that torchrun started; its exit code and record."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")

    def run(*arguments: str):
        code = parallel.main([*QUICK, *arguments, "--output-dir", str(tmp_path)])
        path = tmp_path / "record.json"
        return code, json.loads(path.read_text()) if path.exists() else None

    yield run
    del store


def test_two_ranks_write_one_record(tmp_path):
    """Started by itself: both scopes of requests of different lengths, and a prediction of four ranks."""
    arguments = ["--batch-specs", "q2s40_2q2s9", "--simulate-ranks", "4", "--page-size", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "mlakit", "study", "parallel", *QUICK, *arguments, "--output-dir", "out"],
        capture_output=True, text=True, cwd=tmp_path, check=False, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["schema"] == "mlakit.parallel/1"
    assert record["complete"]
    assert record["links_measured"]
    assert len(record["ranks"]) == 2
    measured = [row for row in record["rows"] if not row["predicted"]]
    ways = [(row["scope"], row["plan"]["strategy"], row["ranks"]) for row in measured]
    names = {"attention": ("one", "tp", "cp", "cp-own", "both"), "layer": ("one", "tp", "cp", "both")}
    assert ways == [(scope, name, 1 if name == "one" else 2) for scope, each in names.items() for name in each]
    for row in measured:
        assert row["reason"] == ""
        assert row["median"] > 0
        assert 0 <= row["error"] <= row["error_allowed"]
        assert len(row["by_rank"]) == 2
        assert set(row["parts"]) >= (
            {"attention", "rest"} if row["plan"]["cp"] == 1 else {"attention", "merge", "communication"}
        )
    predicted = [row for row in record["rows"] if row["predicted"]]
    assert [row["ranks"] for row in predicted] == [2] * 4 + [4] * 4
    for row in predicted:
        assert row["median"] == pytest.approx(sum(row["parts"].values()))
    assert done.stdout.count(" predicted\n") == 8
    assert "no such ranks took part" in done.stdout
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "details.csv").read_text())))
    assert len(lines) == len(record["rows"])
    assert (tmp_path / "out" / "attention-q2s40_2q2s9.png").exists()
    assert done.stderr.startswith("saved in out: record.json, details.csv, attention-q2s40_2q2s9.png")


def test_a_wrong_result_gets_no_time(alone, monkeypatch, capsys):
    original = parallel_parts.Attention.__call__

    def spoiled(self):
        out = original(self)
        out[..., 0] += 0.1
        return out

    monkeypatch.setattr(parallel_parts.Attention, "__call__", spoiled)
    code, record = alone("--batch-specs", "q1s40", "--scope", "attention")
    (row,) = record["rows"]
    assert (code, row["wrong"], row["median"]) == (1, True, None)
    assert row["reason"].startswith("wrong result: rank 0: ")
    assert "no time for one: wrong result" in capsys.readouterr().out


def test_unwritten_output_is_wrong(alone, monkeypatch):
    monkeypatch.setattr(
        parallel_parts.Attention, "__call__", lambda self: setattr(self, "_out", self.q[..., :64].clone())
    )
    code, record = alone("--batch-specs", "q1s40", "--scope", "attention")
    assert (code, record["rows"][0]["wrong"]) == (1, True)


def test_what_cannot_be_built_is_a_row_with_a_reason(alone, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(parallel_run, "Attention", refuse)
    code, record = alone("--batch-specs", "q1s40", "--scope", "attention", "--no-check")
    assert (code, record["rows"][0]["reason"]) == (1, "out of memory")
    assert record["complete"]


def test_one_rank_predicts_by_a_link_that_is_given(alone, capsys):
    code, record = alone(
        "--batch-specs", "q1s64", "--scope", "attention", "--simulate-ranks", "2", "--link-latency", "10",
        "--link-bandwidth", "100",
    )  # fmt: skip
    assert code == 0
    _, tp, cp, cp_own, both = record["rows"]
    assert not record["links_measured"]
    assert [row["predicted"] for row in record["rows"]] == [False, True, True, True, True]
    assert "communication" not in tp["parts"]
    # Few tokens: two ranks send one another values of 64 and lses of all 4 heads; in `both`, first 2 heads' queries
    # of 80 first.
    message = 4 * (64 * 2 + 4) + 16
    assert cp["sent"] == cp_own["sent"] == {"all_gather": message}
    assert cp["parts"]["communication"] == pytest.approx(10e-6 + message / 100e9)
    assert both["sent"] == {"all_gather": 2 * 2 * 80 + message}
    assert both["parts"]["communication"] == pytest.approx(20e-6 + (2 * 2 * 80 + message) / 100e9)
    assert "of the link as given; no such ranks took part" in capsys.readouterr().out


# What a user may get wrong, and the words that say so.
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-specs", "q5"], "without earlier tokens"),
        (["--batch-specs", "q1s1k_q2s1k"], "requests of 1 and of 2 new tokens"),
        (["--ranks", "3"], "4 heads of tiny cannot be divided over 3 ranks"),
        (["--simulate-ranks", "8"], "cannot be divided over 8 ranks"),
        (["--strategies", "tpp"], "did you mean 'tp'"),
        (["--model", "deepseek-v9"], "unknown model 'deepseek-v9'"),
        (["--mode", "graph"], "CUDA graphs need GPUs"),
        (["--ranks", "1", "--simulate-ranks", "2"], "one rank has no link to measure"),
        (["--link-latency", "3"], "belong together"),
        (["--context-ranks", "3"], "a divisor of the 2 ranks, got 3"),
        (["--page-size", "12"], "a power of two, got 12"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys, tmp_path):
    assert parallel.main([*QUICK, *arguments, "--output-dir", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interrupt_says_what_is_kept(monkeypatch, capsys, tmp_path):
    """Before the first row, and after it; the record of an earlier run keeps its content under another name."""
    monkeypatch.chdir(tmp_path)
    Path("r.json").write_text("measured yesterday")
    wrote = False

    def interrupted(target, ranks, options, folder, record, *, timeout):
        if wrote:
            record.write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "launch", interrupted)
    command = [*QUICK, "--batch-specs", "q1s40", "--output-dir", "out", "--output-json", "r.json"]
    assert parallel.main(command) == 130
    assert "interrupted; nothing is saved" in capsys.readouterr().err
    assert Path("r.json.bak").read_text() == "measured yesterday"
    wrote = True
    assert parallel.main(command) == 130
    assert "interrupted; the rows that were done are in r.json" in capsys.readouterr().err


def test_what_imports_torch_for_the_ranks_leaves_ctrl_c_to_us(monkeypatch):
    seen = []

    def running():
        seen.append(signal.getsignal(signal.SIGINT))
        raise InterruptedError

    monkeypatch.setattr(forkserver, "ensure_running", running)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedError):
        launch.launch(int, 1, timeout=1.0)
    assert seen == [signal.SIG_IGN]
    assert signal.getsignal(signal.SIGINT) is before


def test_plans():
    assert plans_of("one", 4) == [Plan("one", 1, 1)]
    assert plans_of("tp", 4) == [Plan("tp", 4, 1)]
    assert plans_of("cp", 4) == [Plan("cp", 1, 4, gather=False, own=False)]
    assert plans_of("cp-own", 4) == [Plan("cp-own", 1, 4, gather=False)]
    assert plans_of("both", 4) == [Plan("both", 1, 4)]
    assert plans_of("both", 8, (2, 8, 3)) == [Plan("both", 4, 2), Plan("both", 1, 8)]
    assert plans_of("both", 2, (4,)) == [Plan("both", 1, 2)]
    assert plans_of("both", 4, (1,)) == []
    assert [plans_of(name, 1) for name in ("tp", "cp", "cp-own", "both")] == [[]] * 4


def _row(strategy, median, *, ranks=2, predicted=False, **fields):
    (plan,) = plans_of(strategy, ranks)
    return Row("attention", "q1s1k", plan, "graph", predicted=predicted, median=median, **fields)


def test_findings_follow_from_the_rows():
    rows = [
        _row("one", 100e-6, ci95=(99e-6, 101e-6)),
        _row("tp", 80e-6, ci95=(79e-6, 81e-6)),
        _row("cp", 50e-6, ci95=(49e-6, 51e-6), parts={"attention": 30e-6, "communication": 10e-6}, floor=2e-6),
        _row("cp", 45e-6, predicted=True),
        _row("cp", 20e-6, ranks=8, predicted=True),
        _row("both", None, reason="out of memory"),
    ]
    assert findings(rows) == [
        "attention, q1s1k: cp 1x2 is the fastest, 50.0 µs, 2.00x one rank on 2; tp 2x1 1.60x its time, one 2.00x its "
        "time",
        "attention, q1s1k: cp 1x2 communicates for 10.0 µs, 20% of its time, 5.0x the floor by bytes",
        "attention, q1s1k: a prediction made the same way for cp 1x2, which was measured, is 45.0 µs: 10% below the "
        "50.0 µs measured",
        "attention, q1s1k: prediction, not measured: cp 1x8 on 8 ranks 20.0 µs, 5.00x one rank",
        "attention, q1s1k: no time for both 1x2: out of memory",
    ]
    assert findings([]) == []
    lines = list(table(rows))
    assert lines[4].endswith("5.00x predicted")
    assert lines[5].endswith("out of memory")
    assert len(csv_text(rows).splitlines()) == 7


def test_no_order_among_those_that_cannot_be_told_apart():
    rows = [_row("tp", 50e-6, ci95=(49e-6, 52e-6)), _row("cp", 51e-6, ci95=(50e-6, 53e-6))]
    assert findings(rows) == ["attention, q1s1k: tp 2x1 is the fastest, 50.0 µs; not to be told apart from cp 1x2"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_committed_records(ranks):
    """Several GPUs, every row of them checked, with the clocks of all; and reports can read it."""
    path = ROOT / "results" / f"h200x{ranks}" / "parallel.json"
    record = json.loads(path.read_text())
    assert record["complete"] is (ranks == 2)  # that of four was ended before its last layers
    assert record["links_measured"]
    assert [rank["name"] for rank in record["ranks"]] == ["NVIDIA H200"] * ranks
    assert all(record["environment"][name] for name in ("torch", "triton", "nccl", "driver", "commit"))
    for row in record["rows"]:
        assert row["reason"] == ""
        if not row["predicted"]:
            assert row["error"] <= row["error_allowed"]
            assert all(state["sm_clock"] > 0 for state in row["gpus"])
            assert len(row["gpus"]) == len(row["by_rank"]) == ranks
    loaded = load_record(path)
    assert len(loaded.rows) == len(record["rows"])
    times = {(row.operation, row.job, row.backend): row.seconds for row in loaded.rows}
    assert times["attention over ranks", "q1s1024k", "one"] == min(record["rows"][0]["by_rank"])
    assert ("attention over ranks", "q1s1024k", f"cp 1x{2 * ranks}, predicted") in times
    assert len({row.identity for row in loaded.rows}) == len(loaded.rows)


def test_what_documents_say_of_predictions():
    """How far from what four GPUs took the prediction made from two was, job by job: the sentence names the range."""
    said = (ROOT / "docs" / "distributed.md").read_text()
    found = re.search(r"between (\S+)% below and (\S+)% above what four then took", " ".join(said.split()))
    assert found
    predicted, measured = (
        {(row.job, row.backend.removesuffix(", predicted")): row.seconds for row in load_record(path).rows
         if row.operation == "attention over ranks" and row.predicted is wanted}
        for path, wanted in ((ROOT / "results" / "h200x2" / "parallel.json", True),
                             (ROOT / "results" / "h200x4" / "parallel.json", False))
    )  # fmt: skip
    off = [seconds / measured[key] - 1 for key, seconds in predicted.items() if key in measured]
    assert len(off) >= 8
    assert found.groups() == (f"{-100 * min(off):.1f}", f"{100 * max(off):.0f}")
