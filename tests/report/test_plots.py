from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import BenchmarkResult, LimitRow, Record, Session, TimingRow
from mlakit.report.plots import COLOURS, HATCHES, plot_times


def row(backend: str = "sdpa", spec: str = "8q1s1k", median: float | None = 1e-3, **fields: Any) -> BenchmarkResult:
    config = BenchmarkConfig.model_validate({"model": "tiny", "backend": backend, "batch_spec": spec, **fields})
    if median is None:
        return BenchmarkResult(config=config, status="timeout", error="no answer")
    timing = TimingRow(
        median=median, mean=median, std=0, min=median, max=median, p20=median, p80=median,
        ci95=(median * 0.9, median * 1.2), samples=[median],
    )  # fmt: skip
    limit = LimitRow(flops=1, bytes=1, seconds=median / 4, bound="memory")
    return BenchmarkResult(config=config, timing=timing, limit=limit)


def record(*rows: BenchmarkResult) -> Record:
    session = Session(started="now", environment={"device": {"name": "a GPU"}})
    return Record(name="mine", planned=len(rows), sessions=[session], rows=list(rows))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures: list[Figure] = []
    real = Figure.savefig

    def watched(self, *args, **kwargs):
        figures.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def opens(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and matplotlib.image.imread(path).shape[2] == 4


def test_bars_by_batch_and_backend(tmp_path, drawn):
    path = tmp_path / "deep" / "times.png"  # the folder is made
    rows = [row("sdpa", median=2e-3), row("torch_absorb"), row("sdpa", "q64", 5e-3), row("torch_naive", median=None)]
    assert plot_times(record(*rows), path)
    assert opens(path)
    (axes,) = drawn[0].axes
    bars = {
        c.get_label(): [bar.get_height() for bar in c]
        for c in axes.containers
        if len(c) and hasattr(c[0], "get_height")
    }
    # In microseconds, and nothing for the row that has no time.
    assert bars == {"sdpa": pytest.approx([2000, 5000]), "torch_absorb": pytest.approx([1000])}
    assert axes.get_yscale() == "log"
    assert "µs" in axes.get_ylabel()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8q1s1k", "q64"]
    # Each batch's limit, in the same unit, told once in the legend.
    limits = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert limits == pytest.approx([500, 1250])
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert sorted(legend) == ["least possible (measured ceilings)", "sdpa", "torch_absorb"]
    for said in ("mine", "MLA, tiny", "4 heads", "bf16", "cold cache", "a GPU"):
        assert said in axes.get_title(loc="left")


def test_slow_runs_are_told_in_milliseconds(tmp_path, drawn):
    assert plot_times(record(row(median=0.5), row("torch_absorb")), tmp_path / "t.png")
    (axes,) = drawn[0].axes
    assert "ms" in axes.get_ylabel()
    assert max(bar.get_height() for bar in axes.patches) == pytest.approx(500)


def test_standard_attention_says_so(tmp_path, drawn):
    assert plot_times(record(row(model="tiny-gqa")), tmp_path / "t.png")
    assert "standard attention" in drawn[0].axes[0].get_title(loc="left")


def test_what_there_is_no_room_for_is_said(tmp_path, drawn):
    rows = [row(spec=f"{n}q1s64") for n in range(1, 31)]
    assert plot_times(record(*rows), tmp_path / "t.png")
    (axes,) = drawn[0].axes
    assert f"; {30 - len(axes.get_xticks())} more batches in the table" in axes.get_title(loc="left")
    assert opens(tmp_path / "t.png")


def test_many_backends_are_told_apart(tmp_path, drawn):
    rows = [row(label=f"sdpa_{n}") for n in range(20)]
    assert plot_times(record(*rows), tmp_path / "t.png")
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in drawn[0].axes[0].patches}
    assert len(looks) == 20 <= len(COLOURS) * len(HATCHES)


def test_a_batch_with_failures_only_has_no_place(tmp_path, drawn):
    assert plot_times(record(row("sdpa", "q64", None), row("sdpa", "q32")), tmp_path / "t.png")
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["q32"]


@pytest.mark.parametrize("rows", [[], [row(median=None), row("torch_naive", median=None)]], ids=["none", "failed"])
def test_no_times_no_file(tmp_path, rows):
    path = tmp_path / "deep" / "t.png"
    assert plot_times(record(*rows), path) is False
    assert list(tmp_path.iterdir()) == []
