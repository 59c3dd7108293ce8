"""The table at the end of a run. It fits the terminal by leaving out what matters least; a pipe gets all of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlakit.bench.batch_spec import get_batch_type
from mlakit.bench.columns import PIPE_WIDTH, fit
from mlakit.bench.grouping import grouped
from mlakit.bench.results import STATUS_WORDS, BenchmarkResult
from mlakit.bench.units import percent, rate, seconds, three


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[BenchmarkResult, "_Batch"], str]
    keep: int  # the lower, the longer it stays when room is short
    right: bool = True


@dataclass(frozen=True)
class _Batch:
    """The rows of one batch on one model: what is compared with one another."""

    rows: tuple[BenchmarkResult, ...]

    @property
    def best(self) -> float | None:
        return min((r.timing.median for r in self.rows if r.timing), default=None)


def comparison_key(row: BenchmarkResult) -> tuple[object, ...]:
    """Rows with the same key measured the same job, so that their times may be compared."""
    gpu = None if row.place is None else row.place.gpu or row.place.node  # a ratio across GPUs is no ratio
    return (*row.config.comparison, gpu)


def group_rows(rows: Sequence[BenchmarkResult]) -> list[tuple[BenchmarkResult, ...]]:
    """Rows that may be compared, together; groups and rows in order of first appearance."""
    return [tuple(group) for group in grouped(rows, comparison_key)]


def _time(row: BenchmarkResult, batch: _Batch) -> str:
    return seconds(row.timing.median) if row.timing else STATUS_WORDS[row.status]


def _interval(row: BenchmarkResult, batch: _Batch) -> str:
    if not row.timing or len(row.timing.samples) < 2:
        return ""
    low, high = row.timing.ci95
    return f"-{percent(1 - low / row.timing.median)} +{percent(high / row.timing.median - 1)}"


def _limit(row: BenchmarkResult, batch: _Batch) -> str:
    return percent(row.fraction_of_limit) if row.fraction_of_limit is not None else ""


def _rate(row: BenchmarkResult, batch: _Batch) -> str:
    if not row.timing or not row.limit:
        return ""
    if row.limit.bound == "memory":
        return rate(row.limit.bytes / row.timing.median, "B/s")
    return rate(row.limit.flops / row.timing.median, "FLOP/s")


def _relative(row: BenchmarkResult, batch: _Batch) -> str:
    if not row.timing or batch.best is None or len(batch.rows) < 2:
        return ""
    return "best" if row.timing.median == batch.best else f"{three(row.timing.median / batch.best)}x"


def _tokens(row: BenchmarkResult, batch: _Batch) -> str:
    return rate(row.throughput_tokens_per_sec, "").rstrip() if row.throughput_tokens_per_sec else ""


def _host(row: BenchmarkResult, batch: _Batch) -> str:
    return seconds(row.timing.host) if row.timing and row.timing.host is not None else ""


def _mode(row: BenchmarkResult, batch: _Batch) -> str:
    return "+".join(dict.fromkeys(mode for mode in row.modes.values() if mode != "standard"))


def _checked(row: BenchmarkResult, batch: _Batch) -> str:
    if not row.success:
        return ""
    return "ok" if row.check else "unchecked"


def _place(row: BenchmarkResult, batch: _Batch) -> str:
    if row.place is None or row is not batch.rows[0]:
        return ""
    # A UUID's first block tells the GPUs of a node apart: "GPU-1a2b3c4d".
    return row.place.node if row.place.gpu is None else f"{row.place.node} {row.place.gpu[:12]}"


def _columns(rows: Sequence[BenchmarkResult], relative: bool) -> list[_Column]:
    one_size = len({(r.config.num_q_heads, r.config.num_kv_heads) for r in rows}) <= 1
    columns = [
        _Column("batch", lambda r, b: r.config.batch_title if r is b.rows[0] else "", 0, right=False),
        _Column("type", lambda r, b: get_batch_type(r.config.batch_spec) if r is b.rows[0] else "", 6, right=False),
        _Column("backend", lambda r, b: r.config.title, 0, right=False),
        _Column("mode", _mode, 8, right=False),
        _Column("time", _time, 0),
        _Column("95% interval", _interval, 7),
        _Column("of limit", _limit, 2),
        _Column("rate", _rate, 4),
        _Column("tokens/s", _tokens, 5),
        _Column("vs best", _relative, 1),
        _Column("host", _host, 9),
        _Column("measured on", _place, 10, right=False),
        _Column("check", _checked, 3),
    ]
    if not one_size:
        columns.insert(2, _Column("heads", lambda r, b: str(r.config.num_q_heads) if r is b.rows[0] else "", 0))
    if not relative:
        columns = [c for c in columns if c.title != "vs best"]
    # A column that says nothing in any row is not worth its room.
    batches = [_Batch(group) for group in group_rows(rows)]
    return [c for c in columns if any(c.cell(row, batch) for batch in batches for row in batch.rows)]


def print_table(
    console: Console, rows: Sequence[BenchmarkResult], *, relative: bool = True, title: str | None = None
) -> None:
    """Print rows grouped by batch, the fastest of each in bold, and below it the reasons why rows have no time."""
    batches = [_Batch(group) for group in group_rows(rows)]
    columns = _columns(rows, relative)
    cells = [[[column.cell(row, batch) for column in columns] for row in batch.rows] for batch in batches]
    keep = _fit(columns, [line for batch in cells for line in batch], console.width)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index in keep:
        table.add_column(columns[index].title, justify="right" if columns[index].right else "left", overflow="fold")
    for batch, lines in zip(batches, cells, strict=True):
        for row, line in zip(batch.rows, lines, strict=True):
            is_best = row.timing is not None and row.timing.median == batch.best and len(batch.rows) > 1
            style = "bold green" if is_best else "" if row.success else "yellow"
            table.add_row(*[Text(line[i], style=style) for i in keep], end_section=row is batch.rows[-1])
    console.print(table)
    if len(keep) < len(columns):
        left_out = ", ".join(c.title for i, c in enumerate(columns) if i not in keep)
        console.print(Text(f"(left out for want of room: {left_out})", style="dim"))
    print_reasons(console, rows)


def print_reasons(console: Console, rows: Sequence[BenchmarkResult]) -> None:
    """A line for each reason why rows have no time, with the backends and batches that have it."""
    for same in grouped((row for row in rows if not row.success), lambda row: (row.status, row.error)):
        of_each = grouped(same, lambda row: row.config.title)
        batches = {mine[0].config.title: _names(row.config.batch_title for row in mine) for mine in of_each}
        for titles in grouped(batches, batches.__getitem__):
            what = f"{_names(titles)} on {batches[titles[0]]}: {STATUS_WORDS[same[0].status]}: {same[0].error}"
            console.print(Text(what, style="yellow"), soft_wrap=not console.is_terminal)


def _names(names: Iterable[str]) -> str:
    """All of them, or of many the first ones: the table above has the others."""
    listed = list(dict.fromkeys(names))
    return ", ".join(listed) if len(listed) <= 5 else f"{', '.join(listed[:4])} and {len(listed) - 4} others"


def _fit(columns: Sequence[_Column], lines: Sequence[Sequence[str]], width: int) -> list[int]:
    """Indices of the columns that fit into `width`."""
    widths = [max(len(c.title), *(len(line[i]) for line in lines)) for i, c in enumerate(columns)]
    return fit(widths, [c.keep for c in columns], width)


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for everything when the output goes to a file or a pipe."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=PIPE_WIDTH)
