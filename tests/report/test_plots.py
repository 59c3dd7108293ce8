"""PNGs: what is drawn where, in which unit, and that every committed record can be drawn."""

from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from mlakit.cli.main import main
from mlakit.report import plots, style
from mlakit.report.load import load_record
from mlakit.report.plots import plot_times, write_plots
from tests.support.reports import RESULTS, bench_row


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """What is drawn is the same, in less time."""
    monkeypatch.setattr(style, "DPI", 30)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by file name."""
    figures: dict[str, Figure] = {}
    real = Figure.savefig

    def watched(self, path, *args, **kwargs):
        figures[Path(path).name] = self
        real(self, path, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def opens(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and matplotlib.image.imread(path).shape[2] == 4


def dots(figure: Figure) -> dict[str, list[float]]:
    """The x of every dot, by how it looks: lines of errorbars come first, the legend's own are empty."""
    (axes,) = figure.axes
    found: dict[str, list[float]] = {}
    for line in axes.lines:
        if line.get_marker() in style.MARKERS and len(line.get_xdata()):
            found[str(line.get_marker())] = [float(x) for x in line.get_xdata()]
    return found


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def title(figure: Figure) -> str:
    found = figure._suptitle  # type: ignore[attr-defined]
    return str(found.get_text())


def test_times_by_batch_and_backend(tmp_path, drawn, make_record):
    path = tmp_path / "deep" / "times.png"  # the folder is made
    rows = [bench_row("sdpa", median=2e-3), bench_row("flash"), bench_row("sdpa", "q64", 5e-3),
            bench_row("torch_naive", median=None)]  # fmt: skip
    assert plot_times(make_record(*rows), path)
    assert opens(path)
    figure = drawn["times.png"]
    # In microseconds, and nothing for the row that has no time.
    assert dots(figure) == {"o": pytest.approx([2000, 5000]), "s": pytest.approx([1000])}
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "µs (log scale)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["8q1s1k", "q64"]
    assert legend(figure) == ["sdpa", "flash", "least possible (measured ceilings)"]
    limits = max((line for line in axes.lines if line.get_marker() == "|"), key=lambda line: line.get_markersize())
    assert list(limits.get_xdata()) == pytest.approx([25, 25])
    # The interval, 1% to either side.
    ends = {round(x, 3) for bar in axes.collections for segment in bar.get_segments() for x, _ in segment}
    assert {1980, 2020, 990, 1010} <= ends
    for said in ("mine", "attention", "deepseek-v2-lite", "16 heads", "bf16", "cold cache", "a GPU"):
        assert said in title(figure)


def test_slow_runs_are_told_in_larger_units(tmp_path, drawn, make_record):
    for median, unit, shown in ((0.5, "ms", 500), (20.0, "s", 20)):
        assert plot_times(make_record(bench_row(median=median), bench_row("flash")), tmp_path / f"{unit}.png")
        assert drawn[f"{unit}.png"].axes[0].get_xlabel() == f"{unit} (log scale)"
        assert max(dots(drawn[f"{unit}.png"])["o"]) == pytest.approx(shown)


def test_more_than_a_picture_holds(tmp_path, drawn, make_record, monkeypatch):
    monkeypatch.setattr(plots, "_MOST_DOTS", 8)
    rows = [bench_row(backend, spec=f"{b}q1s64") for b in range(1, 8) for backend in ("sdpa", "flash") if b < 5 or
            backend == "flash"]  # fmt: skip
    record = make_record(*rows)
    assert plot_times(record, tmp_path / "t.png")
    assert "3 more batches in the table" in title(drawn["t.png"])
    first, second = (drawn[p.name] for p in write_plots([record], tmp_path) if "times" in p.name)
    assert [len(f.axes[0].get_yticklabels()) for f in (first, second)] == [4, 3]
    # A backend looks the same on every page, also where it is alone.
    assert list(dots(first)) == ["o", "s"]
    assert list(dots(second)) == ["s"]


def test_styles_repeat_late():
    assert len({(style.colour(i), style.marker(i)) for i in range(77)}) == 77


@pytest.mark.parametrize(
    "rows", [[], [bench_row(median=None), bench_row("flash", median=None)]], ids=["none", "failed"]
)
def test_no_times_no_file(tmp_path, make_record, rows):
    path = tmp_path / "deep" / "t.png"
    record = make_record(*rows)
    assert plot_times(record, path) is False
    assert not path.parent.exists()
    with pytest.raises(ValueError, match="nothing to plot: no row of"):
        write_plots([record], tmp_path / "deep")


def test_every_question_a_record_answers(tmp_path, drawn, make_record):
    """Three lengths, two backends, memory: times, limit, memory, a sweep by keys, a roofline, speed-ups over one."""
    rows = [
        bench_row(backend, f"8q1s{keys}", 1e-6 * keys * slower, memory_temporary_mb=2.0)
        for keys in (256, 512, 1024)
        for backend, slower in (("flash", 1), ("sdpa", 3))
    ]
    written = write_plots([make_record(*rows)], tmp_path / "plots", baseline="sdpa")
    assert sorted(path.name for path in written) == [
        f"mine-attention-{kind}.png" for kind in ("limit", "memory", "roofline", "speed-up", "sweep-keys", "times")
    ]
    assert all(opens(path) for path in written)
    assert dots(drawn["mine-attention-speed-up.png"]) == {"o": pytest.approx([3, 3, 3]), "s": pytest.approx([1, 1, 1])}
    assert dots(drawn["mine-attention-limit.png"])["o"] == pytest.approx([100 * 25 / t for t in (256, 512, 1024)])
    assert dots(drawn["mine-attention-memory.png"])["s"] == [2.0] * 3
    (sweep,) = drawn["mine-attention-sweep-keys.png"].axes
    assert [list(line.get_xdata()) for line in sweep.lines] == [[256, 512, 1024]] * 2
    assert [list(line.get_ydata()) for line in sweep.lines] == [
        pytest.approx([256, 512, 1024]), pytest.approx([768, 1536, 3072])
    ]  # fmt: skip
    assert [label.get_text() for label in sweep.get_xticklabels()] == ["256", "512", "1k"]
    (roofline,) = drawn["mine-attention-roofline.png"].axes
    roof = roofline.lines[0]
    assert max(roof.get_ydata()) == pytest.approx(800)  # TFLOP/s
    ridge = 8e14 / 4e12
    assert list(roof.get_xdata())[1] == ridge
    assert list(roofline.lines[1].get_xdata()) == [10.0] * 3  # 1e9 operations on 1e8 bytes
    assert list(roofline.lines[1].get_ydata()) == pytest.approx([1e9 / (t * 1e-6) / 1e12 for t in (256, 512, 1024)])


def test_two_records_of_one_name_keep_their_own_files(tmp_path, make_record):
    written = write_plots([make_record(bench_row()), make_record(bench_row())], tmp_path / "plots")
    assert len(set(written)) == len(written)
    assert {path.name for path in written} >= {"mine-attention-times.png", "mine-attention-2-times.png"}


def test_names_of_jobs_say_what_differs(tmp_path, drawn):
    write_plots([load_record(RESULTS / "concat.json")], tmp_path)
    labels = [text.get_text() for text in drawn["concat-concat-k-times.png"].axes[0].get_yticklabels()]
    assert len(set(labels)) == len(labels)
    assert not any("heads" in label or "…" in label for label in labels)


# Of bench, and of studies with several methods a row and with phases; bench-h200's is drawn above.
@pytest.mark.parametrize("name", ["backends_mla", "k_concat", "layers"])
def test_committed_records_can_be_drawn(tmp_path, name):
    written = write_plots([load_record(RESULTS / f"{name}.json")], tmp_path)
    assert any("times" in path.name for path in written)
    assert all(opens(path) for path in written)


def test_report_writes_plots(tmp_path, capsys, make_record):
    record = make_record(bench_row(), bench_row("flash"))
    assert main(["report", str(record.path), "--plot", str(tmp_path / "plots"), "--baseline", "sdpa"]) == 0
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == [f"mine-attention-{kind}.png" for kind in ("limit", "roofline", "speed-up", "times")]
    with pytest.raises(SystemExit) as end:
        main(["report", str(record.path), "--plot", str(tmp_path / "plots"), "--baseline", "flashmla"])
    assert end.value.code == 2
    assert "--baseline: no row of 'flashmla'; the records have: flash, sdpa" in capsys.readouterr().err
