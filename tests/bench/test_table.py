import io
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from mlakit.bench.columns import PIPE_WIDTH
from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import STATUS_WORDS, BenchmarkResult, CheckRow, LimitRow, TimingRow
from mlakit.bench.table import comparison_key, group_rows, make_console, print_table

CHECK = CheckRow(max_error=1e-3, max_error_allowed=2e-3, rms_error=1e-4, rms_error_allowed=2e-4, cosine_distance=0)
COLUMNS = [
    "batch", "type", "backend", "mode", "time", "95% interval", "of limit", "rate", "tokens/s", "vs best", "check",
]  # fmt: skip


def row(backend: str = "sdpa", spec: str = "8q1s1k", median: float | None = 1e-3, **fields: Any) -> BenchmarkResult:
    """A row; fields that a config has go there."""
    settings = {k: fields.pop(k) for k in list(fields) if k in BenchmarkConfig.model_fields and k != "check"}
    config = BenchmarkConfig.model_validate({"model": "tiny", "backend": backend, "batch_spec": spec, **settings})
    if median is None:
        return BenchmarkResult(**{"config": config, "status": "error", "error": "why it failed", **fields})
    timing = TimingRow(
        median=median, mean=median, std=0, min=median, max=median, p20=median, p80=median,
        ci95=(median * 0.96, median * 1.02), samples=[median] * 3,
    )  # fmt: skip
    limit = LimitRow(flops=10**9, bytes=10**8, seconds=median / 4, bound="memory")
    told = {"timing": timing, "limit": limit, "check": CHECK, "modes": {"decode": "mqa"}}
    return BenchmarkResult(**{"config": config, **told, **fields})


def shown(rows: Sequence[BenchmarkResult], width: int = PIPE_WIDTH, *, terminal: bool = False, **options: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, highlight=False)
    print_table(console, rows, **options)
    return file.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def header(text: str) -> list[str]:
    return re.split(r"\s{2,}", text.splitlines()[0].strip())


def body(text: str) -> list[str]:
    return [line for line in text.splitlines()[2:] if line.strip()]


def test_all_columns_and_what_they_say():
    text = shown([row("sdpa", median=2e-3), row("torch_absorb", median=1e-3)])
    assert header(text) == COLUMNS
    first, second = body(text)
    # 100 MB in 2 ms; 8 tokens in 2 ms; a limit of a quarter of each time.
    assert re.split(r"\s{2,}", first.strip()) == [
        "8q1s1k", "decode", "sdpa", "mqa", "2.00 ms", "-4.0% +2.0%", "25%", "50.0 GB/s", "4.00 k", "2.00x", "ok",
    ]  # fmt: skip
    assert re.split(r"\s{2,}", second.strip()) == [
        "torch_absorb", "mqa", "1.00 ms", "-4.0% +2.0%", "25%", "100 GB/s", "8.00 k", "best", "ok",
    ]  # fmt: skip


def test_compute_bound_rows_tell_operations():
    limit = LimitRow(flops=5 * 10**11, bytes=1, seconds=1e-4, bound="compute")
    assert "500 TFLOP/s" in shown([row(limit=limit)])


@pytest.mark.parametrize(
    ("rows", "absent"),
    # A column that says nothing is not there: nothing to compare with, standard attention's one mode, no limit, a
    # single sample, no time at all.
    [
        ([row()], {"vs best"}),
        ([row(model="tiny-gqa", modes={"all": "standard"})], {"vs best", "mode"}),
        ([row(limit=None)], {"vs best", "of limit", "rate"}),
        (
            [row(median=None)],
            {"vs best", "of limit", "rate", "mode", "95% interval", "tokens/s", "check"},
        ),
    ],
    ids=["alone", "standard", "no limit", "failed"],
)
def test_columns_that_say_nothing_are_left_out_silently(rows, absent):
    text = shown(rows)
    assert header(text) == [name for name in COLUMNS if name not in absent]
    assert "left out" not in text


def test_heads_are_told_where_they_differ():
    text = shown([row(num_q_heads=8), row(num_q_heads=4)])
    assert header(text)[2] == "heads"
    assert [line.split()[2] for line in body(text)] == ["8", "4"]
    assert "heads" not in header(shown([row(num_q_heads=8), row("torch_absorb", num_q_heads=8)]))


def test_a_batch_is_named_once():
    text = shown([row("sdpa"), row("torch_absorb"), row("sdpa", "q64"), row("torch_absorb", "q64")])
    assert text.count("8q1s1k") == text.count("q64") == 1


def test_not_relative():
    rows = [row("sdpa"), row("torch_absorb", median=2e-3)]
    assert "vs best" in header(shown(rows))
    assert "vs best" not in header(shown(rows, relative=False))


def test_unchecked_rows_say_so():
    text = shown([row("sdpa", check=None), row("torch_absorb")])
    assert body(text)[0].split()[-1] == "unchecked"
    assert body(text)[1].split()[-1] == "ok"


def test_title():
    assert shown([row()], title="quickstart").splitlines()[0].strip() == "quickstart"


def test_no_rows():
    assert shown([]).strip() == ""


@pytest.mark.parametrize("status", sorted(set(STATUS_WORDS) - {"ok"}))
def test_a_row_without_a_time_has_a_word_and_a_full_reason(status):
    reason = "a reason [of any kind] that is " + "longer than any terminal is wide, " * 8
    text = shown([row("sdpa", median=None, status=status, error=reason), row("torch_absorb")])
    assert STATUS_WORDS[status] in body(text)[0]
    # On one line where it goes to a file, so that grep finds it.
    assert text.splitlines()[-1] == f"sdpa on 8q1s1k: {STATUS_WORDS[status]}: {reason}"
    assert "torch_absorb on" not in text


def test_a_failed_row_is_not_compared():
    first, second = body(shown([row("sdpa", median=None), row("torch_absorb", median=1e-3)]))[:2]
    assert "best" not in first
    assert "best" in second


MANY = [
    row(backend, spec, median, label=label)
    for spec in ("8q1s1k", "2q512s4k", "q1k_16q1s2k")
    for backend, median, label in (("sdpa", 1.234e-3, None), ("torch_absorb", 5e-4, None), ("sdpa", 0.9, "sdpa_16h"))
]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_it_fits_and_says_what_it_left_out(width):
    text = plain(shown([*MANY, row("torch_naive", median=None)], width, terminal=True))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    told = re.search(r"\(left out for want of room: ([^)]*)\)", text)
    left_out = re.split(r",\s+", told[1].replace("\n", " ")) if told else []
    assert sorted([*header(text), *left_out]) == sorted(COLUMNS)
    # What a table without would be no table.
    assert {"batch", "backend", "time"} <= set(header(text))
    assert bool(left_out) == (width < 150)
    for line in ("8q1s1k", "2q512s4k", "q1k_16q1s2k", "torch_absorb", "sdpa_16h", "1.23 ms", "500 µs", "900 ms"):
        assert line in text


def test_the_least_important_goes_first():
    kept = [set(header(plain(shown(MANY[:3], width)))) for width in range(140, 30, -1)]
    for wider, narrower in pairwise(kept):
        assert narrower <= wider
    order = list(dict.fromkeys(name for wider, narrower in pairwise(kept) for name in wider - narrower))
    assert order == ["mode", "95% interval", "type", "tokens/s", "rate", "check", "of limit", "vs best"]


def test_what_is_wider_than_the_terminal_is_folded_and_not_cut():
    label = "sdpa-with-a-label-that-no-narrow-terminal-has-room-for-at-once"
    spec = "3q1s70_2q4s33_5q17s99_q1k_64q1s4k_11q2s2k"
    text = shown([row(label=label, spec=spec)], 40)
    assert max(map(len, text.splitlines())) <= 40
    assert "…" not in text
    lines = body(text.split("(left out")[0])
    start = text.splitlines()[0].index("backend")
    assert "".join(line[:start].strip() for line in lines) == spec
    assert "".join(line[start:].split()[0] for line in lines if line[start:].strip()) == label


def test_names_are_not_markup():
    assert "[red]x[/red]" in shown([row(label="[red]x[/red]")])


# --- what is compared with what ---


@pytest.mark.parametrize(
    "fields",
    # What makes it another job.
    [
        {"spec": "8q1s2k"},
        {"model": "tiny-gqa"},
        {"num_q_heads": 8},
        {"kv_lora_rank": 32},
        {"qk_nope_head_dim": 16},
        {"v_head_dim": 16},
        {"dtype": "fp16"},
        {"scope": "pipeline"},
        {"l2": "hot"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_another_job_is_not_compared(fields):
    assert comparison_key(row(**fields)) != comparison_key(row())
    assert len(group_rows([row(), row(**fields)])) == 2


@pytest.mark.parametrize(
    "fields",
    # Another way to do the same job: what a comparison is for.
    [
        {"backend": "torch_absorb"},
        {"label": "mine"},
        {"reorder_batch_threshold": 4},
        {"parameters": {"num_kv_splits": 4}},
        {"pipeline": "decode"},
        {"block_size": 128},
        {"cuda_graph": True},
        {"median": 5.0},
        {"median": None},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_another_way_to_do_it_is_compared(fields):
    assert comparison_key(row(**fields)) == comparison_key(row())


def test_groups_come_in_order_of_first_appearance():
    a, b, c, d = row("sdpa", "q64"), row("sdpa", "q8"), row("torch_absorb", "q64"), row("torch_naive", "q8")
    assert group_rows([a, b, c, d]) == [(a, c), (b, d)]


# --- colours and widths ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def connect(monkeypatch):
    """Sets standard output or error to a stream, in an environment that says nothing but a terminal's width. To be
    called in the test itself: pytest's own capture sets these streams between a fixture and its test.
    """
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "63")

    def to(stream: io.StringIO, name: str = "stdout") -> io.StringIO:
        monkeypatch.setattr(sys, name, stream)
        return stream

    return to


# Foreground and background colours of every kind; bold and dim are no colours.
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9;]*)?m")


def test_colours_on_a_terminal(connect):
    stream = connect(Terminal())
    print_table(make_console(), MANY)
    assert COLOUR.search(stream.getvalue())


def test_no_color(connect, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = connect(Terminal())
    print_table(make_console(), [*MANY, row(median=None)])
    assert "torch_absorb" in stream.getvalue()
    assert not COLOUR.search(stream.getvalue())


def test_a_terminal_has_its_own_width(connect):
    connect(Terminal())
    assert make_console().width == 63


def test_a_pipe_has_room_for_everything_and_no_escapes(connect):
    stream = connect(io.StringIO())
    assert make_console().width == PIPE_WIDTH
    print_table(make_console(), [*MANY, row(median=None)])
    assert header(stream.getvalue()) == COLUMNS
    assert "\x1b" not in stream.getvalue()


def test_stderr_is_told_apart(connect):
    out, err = connect(Terminal()), connect(io.StringIO(), "stderr")
    make_console(stderr=True).print("progress")
    assert (err.getvalue(), out.getvalue()) == ("progress\n", "")


def test_a_reason_is_told_once():
    """Of several backends and batches together, where both have all of it; a reason of one row alone."""
    specs = ("q1s1k", "q1s2k", "q4s1k")
    same: dict[str, Any] = {"median": None, "status": "unavailable", "error": "no GPU"}
    rows = [row(backend, spec, **same) for spec in specs for backend in ("flashmla", "flex")]
    rows += [row("sdpa", spec, **same) for spec in specs[:2]] + [row("sdpa", specs[2], median=None)]
    assert shown(rows).splitlines()[-3:] == [
        "flashmla, flex on q1s1k, q1s2k, q4s1k: not available: no GPU",
        "sdpa on q1s1k, q1s2k: not available: no GPU",
        "sdpa on q4s1k: failed: why it failed",
    ]
    many = [row("sdpa", f"q1s{length}", **same) for length in range(1, 9)]
    assert shown(many).splitlines()[-1] == "sdpa on q1s1, q1s2, q1s3, q1s4 and 4 others: not available: no GPU"
