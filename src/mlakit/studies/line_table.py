"""A table that grows line by line, while its rows are measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlakit.bench.columns import PIPE_WIDTH, fit


@dataclass(frozen=True)
class LineTable:
    """(title, width, keep) of each column: the lower `keep`, the longer it stays where room is short; 0 always does."""

    columns: Sequence[tuple[str, int, int]]
    width: int = PIPE_WIDTH
    least_rule: int = 0

    @property
    def _kept(self) -> list[int]:
        return fit([width for _, width, _ in self.columns], [keep for *_, keep in self.columns], self.width)

    def head(self) -> Iterator[str]:
        """Which columns there is no room for, if any; the titles, and a rule."""
        if left_out := [title for i, (title, *_) in enumerate(self.columns) if i not in self._kept]:
            yield f"(left out for want of room: {', '.join(left_out)})"
        yield (head := self.line([title for title, *_ in self.columns]))
        yield "-" * min(max(len(head), self.least_rule), self.width)

    def line(self, cells: Sequence[str]) -> str:
        """A row, of the cells of all columns, those left out included."""
        return " | ".join(f"{cells[i]:>{self.columns[i][1]}}" for i in self._kept)
