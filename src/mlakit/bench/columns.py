"""Which columns of a table there is room for. Nothing slow is imported here: parsers of commands need it."""

from collections.abc import Sequence

PIPE_WIDTH = 200  # what goes to a file or a pipe: room for everything


def fit(widths: Sequence[int], keep: Sequence[int], width: int) -> list[int]:
    """Indices of the columns of a table that fit into `width`: those with the highest `keep` go first, and 0 stays."""
    kept = list(range(len(widths)))
    while sum(widths[i] + 3 for i in kept) - 3 > width:  # rich sets columns three apart
        droppable = [i for i in kept if keep[i] > 0]
        if not droppable:
            break
        kept.remove(max(droppable, key=lambda i: keep[i]))
    return kept
