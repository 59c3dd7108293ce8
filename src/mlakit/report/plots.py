"""PNG plots of a record: time by batch and backend, with each batch's limit."""

from collections.abc import Sequence
from pathlib import Path

from mlakit.bench.results import BenchmarkResult, Record
from mlakit.bench.table import group_rows

# Okabe and Ito's palette: told apart with any colour vision, and in grey by the hatches.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
_MOST_BATCHES = 24


def plot_times(record: Record, path: Path) -> bool:
    """Write bars of median time (with 95% intervals) by batch and backend, and the limit of each batch as a line.

    Returns:
        False, and no file, if no row has a time.
    """
    groups = [g for g in group_rows(record.rows) if any(row.timing for row in g)]
    if not groups:
        return False
    # The object interface: pyplot would keep the figure, and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = groups[:_MOST_BATCHES]
    titles = list(dict.fromkeys(row.config.title for group in shown for row in group if row.timing))
    width = 0.8 / len(titles)
    slowest = max(row.timing.median for group in shown for row in group if row.timing)
    unit, factor = ("ms", 1e3) if slowest >= 1e-2 else ("µs", 1e6)
    figure = Figure(
        figsize=(max(7.0, 1.2 + 0.28 * len(titles) * len(shown) + 0.6 * len(shown)), 4.8), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, title in enumerate(titles):
        drawn = [(x, row) for x, group in enumerate(shown) for row in group if row.timing and row.config.title == title]
        medians = [row.timing.median * factor for _, row in drawn if row.timing]
        low = [(row.timing.median - row.timing.ci95[0]) * factor for _, row in drawn if row.timing]
        high = [(row.timing.ci95[1] - row.timing.median) * factor for _, row in drawn if row.timing]
        axes.bar(
            [x - 0.4 + width * (index + 0.5) for x, _ in drawn],
            medians,
            width * 0.92,
            yerr=[low, high],
            capsize=2,
            color=COLOURS[index % len(COLOURS)],
            hatch=HATCHES[(index // len(COLOURS) + index) % len(HATCHES)],
            edgecolor="white",
            linewidth=0.5,
            error_kw={"elinewidth": 1, "ecolor": "#444444"},
            label=title,
        )
    for x, group in enumerate(shown):
        limit = next((row.limit.seconds * factor for row in group if row.limit), None)
        if limit is not None:
            label = "least possible (measured ceilings)" if x == 0 else None
            axes.plot([x - 0.45, x + 0.45], [limit, limit], color="#000000", linewidth=1.4, linestyle=":", label=label)
    axes.set_yscale("log")
    axes.set_ylabel(f"time a layer, {unit} (log scale)")
    axes.set_xticks(range(len(shown)), [_batch_label(group) for group in shown], rotation=30, ha="right")
    axes.set_title(_title(record, len(groups) - len(shown)), loc="left", fontsize=10)
    axes.grid(axis="y", which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        loc="outside lower center",
        ncols=min(4, len(titles) + 1),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def _batch_label(group: Sequence[BenchmarkResult]) -> str:
    return group[0].config.batch_title.replace("_", "_\n")


def _title(record: Record, left_out: int) -> str:
    device = record.sessions[-1].environment["device"]["name"]
    first = record.rows[0].config
    kind = f"MLA, {first.model}" if first.attention == "mla" else "standard attention"
    rest = f"; {left_out} more batches in the table" if left_out else ""
    return f"{record.name}: {kind}, {first.num_q_heads} heads, {first.dtype}, {first.l2} cache, on {device}{rest}"
