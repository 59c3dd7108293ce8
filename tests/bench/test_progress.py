"""Progress: lines where there is no terminal, a bar where there is one, nothing with --quiet."""

import io
import re

import pytest
from rich.console import Console

from mlakit.bench.progress import Progress, time_left
from mlakit.studies.command import progress as study_progress
from tests.support.reports import bench_row


def shown(*rows, terminal: bool = False, quiet: bool = False, width: int = 120, expect: int | None = None) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, highlight=False, no_color=True)
    with Progress(console, quiet=quiet) as progress:
        progress.expect(len(rows) if expect is None else expect)
        for row in rows:
            progress.started(row.config)
            progress.stage("timing")
            if terminal:
                progress._bar.refresh()
            progress.finished(row)
        progress.say("a word")
    return text.getvalue()


ROWS = (bench_row("flash", median=1e-3), bench_row("sdpa", median=3e-3), bench_row("triton", median=0.5e-3),
        bench_row("flex", median=None), bench_row("sdpa", "q64", 1e-3))  # fmt: skip


def test_a_line_a_row_with_the_best_so_far_and_the_time_left():
    lines = shown(*ROWS).splitlines()
    assert [re.sub(r", \d+:\d\d left", ", T left", line) for line in lines] == [
        "[1/5] flash on 8q1s1k: 1.00 ms (2.5% of the limit), T left",
        "[2/5] sdpa on 8q1s1k: 3.00 ms (0.83% of the limit), 3.00x flash, the best so far, T left",
        "[3/5] triton on 8q1s1k: 500 µs (5.0% of the limit), the best so far, T left",
        "[4/5] flex on 8q1s1k: timed out, T left",
        "[5/5] sdpa on q64: 1.00 ms (2.5% of the limit)",  # another batch: nothing to compare with
        "a word",
    ]


def test_how_many_are_to_come_may_be_unknown():
    assert shown(ROWS[0], expect=0).startswith("[1] flash on 8q1s1k: 1.00 ms")


@pytest.mark.parametrize("width", [60, 120])
def test_a_bar_on_a_terminal(width):
    text = shown(*ROWS[:3], terminal=True, width=width)
    frames = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").splitlines()
    assert all(len(line.rstrip()) <= width for line in frames)
    assert any("2/3" in line and "best 1.00 ms flash" in line for line in frames)
    assert not any(line.startswith("[1/3]") for line in frames)
    assert any("left" in line for line in frames)


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet(terminal):
    assert shown(*ROWS, terminal=terminal, quiet=True) == ""


def test_time_left():
    assert time_left(30.0, 1, 4) == ", 1:30 left"
    assert time_left(7200.0, 1, 2) == ", 2:00:00 left"
    assert time_left(5.0, 0, 4) == time_left(5.0, 4, 4) == ""


@pytest.mark.parametrize(("terminal", "quiet"), [("1", False), ("1", True), ("0", False)])
def test_studies_show_a_bar_on_a_terminal_alone(terminal, quiet, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR" if terminal == "1" else "NO_COLOR", "1")
    with study_progress(2, quiet=quiet) as begin:
        begin("the first")
        begin("the second")
    assert ("the second" in capsys.readouterr().err) == (terminal == "1" and not quiet)
