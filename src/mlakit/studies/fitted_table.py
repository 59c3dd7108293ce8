"""A table that leaves out columns rather than break words: where room is short, those that matter least."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlakit.bench.columns import fit


@dataclass(frozen=True)
class Column:
    """A column; the lower `keep`, the longer it stays, and with 0 it always does."""

    title: str
    keep: int = 0
    right: bool = True


def print_fitted(
    console: Console, title: str, columns: Sequence[Column], lines: Sequence[Sequence[str]], *, sections: bool = False
) -> None:
    """Print lines of cells; `sections`: a rule where the first cell changes."""
    widths = [max(len(c.title), *(len(line[i]) for line in lines)) if lines else 0 for i, c in enumerate(columns)]
    keep = fit(widths, [column.keep for column in columns], console.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i in keep:
        table.add_column(columns[i].title, justify="right" if columns[i].right else "left", overflow="fold")
    for at, line in enumerate(lines):
        last = at + 1 == len(lines) or lines[at + 1][0] != line[0]
        table.add_row(*[Text(line[i]) for i in keep], end_section=sections and last)
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
    if len(keep) < len(columns):
        left_out = ", ".join(c.title for i, c in enumerate(columns) if i not in keep)
        console.print(Text(f"(left out for want of room: {left_out})", style="dim"), soft_wrap=True)
