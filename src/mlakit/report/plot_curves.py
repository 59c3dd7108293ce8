"""Plots against a size: times along a sweep, and operations a second against operations a byte."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlakit.report import style
from mlakit.report.rows import Entry

# What a size must have for a curve, and how many panels a picture holds.
_FEWEST_VALUES = 3
_MOST_PANELS = 9
_ACROSS = 3


@dataclass
class Panel:
    """Times (seconds) of each backend by one size, all other sizes being the same."""

    others: str
    lines: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def values(self) -> list[int]:
        """The size's values, ascending."""
        return sorted({x for line in self.lines.values() for x in line})


def draw_curves(entries: Sequence[Entry], folder: Path, stem: str, title: Callable[[str], str]) -> Iterator[Path]:
    """Write a picture for each size that entries of one operation sweep; yields the paths."""
    labels = list(dict.fromkeys(entry.label for entry in entries))
    for size in _sizes(entries):
        panels = _panels(entries, size)
        if not panels:
            continue
        left_out = len(panels) - _MOST_PANELS
        more = f"; {left_out} more in the table" if left_out > 0 else ""
        path = folder / f"{stem}-sweep-{size.replace('_', '-')}.png"
        _draw(panels[:_MOST_PANELS], size, labels, title(f"time of a call by {_words(size)}{more}"), path)
        yield path


def _sizes(entries: Sequence[Entry]) -> list[str]:
    """Sizes that are whole numbers and take several values."""
    found: dict[str, set[int]] = {}
    for entry in entries:
        for name, value in entry.row.sizes.items():
            if isinstance(value, int) and not isinstance(value, bool):
                found.setdefault(name, set()).add(value)
    return [name for name, values in found.items() if len(values) >= _FEWEST_VALUES]


def _panels(entries: Sequence[Entry], size: str) -> list[Panel]:
    """Panels with enough points; those with most come first."""
    found: dict[str, Panel] = {}
    constant = _constant(entries, size)
    for entry in entries:
        at = entry.row.sizes.get(size)
        if not entry.row.seconds or not isinstance(at, int):
            continue
        others = {k: v for k, v in {"model": entry.row.model, **entry.row.sizes}.items() if k != size}
        # Names of jobs hold their sizes, and would tell all apart; a suffix such as "causal" is in the sizes too.
        key = json.dumps(others, sort_keys=True)
        shown = ", ".join(f"{_words(k)} {v}" for k, v in others.items() if k not in constant and v not in ("", None))
        panel = found.setdefault(key, Panel(shown))
        panel.lines.setdefault(entry.label, {})[at] = entry.row.seconds
    enough = [panel for panel in found.values() if len(panel.values) >= _FEWEST_VALUES]
    return sorted(enough, key=lambda panel: -sum(map(len, panel.lines.values())))


def _constant(entries: Sequence[Entry], size: str) -> set[str]:
    """Sizes that are the same everywhere: no panel need say them."""
    values: dict[str, set[Any]] = {}
    for entry in entries:
        for name, value in {"model": entry.row.model, **entry.row.sizes}.items():
            values.setdefault(name, set()).add(value)
    return {name for name, found in values.items() if len(found) == 1} | {size}


def _draw(panels: Sequence[Panel], size: str, labels: Sequence[str], title: str, path: Path) -> None:
    across = min(_ACROSS, len(panels))
    down = -(-len(panels) // across)
    width = max(6.5, 3.6 * across)
    figure = style.new_figure(width, 1.4 + 2.9 * down, title)
    grid = figure.subplots(down, across, squeeze=False).flat
    handles: dict[str, Any] = {}
    unit, factor = style.time_unit([t for panel in panels for line in panel.lines.values() for t in line.values()])
    for axes, panel in zip(grid, panels, strict=False):
        for name, line in panel.lines.items():
            index = labels.index(name)
            x = sorted(line)
            look = {"color": style.colour(index), "marker": style.marker(index), "markersize": 4, "linewidth": 1.2}
            (handles[name],) = axes.plot(x, [line[at] * factor for at in x], label=name, **look)
        style.doubling_axis(axes, panel.values)
        style.log_axis(axes.yaxis, [t * factor for line in panel.lines.values() for t in line.values()])
        axes.set(xlabel=_words(size), ylabel=f"{unit} (log scale)", title=panel.others)
        style.tidy(axes)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    style.legend(figure, {name: handles[name] for name in labels if name in handles}, width)
    style.save(figure, path)


def draw_roofline(entries: Sequence[Entry], title: str, path: Path) -> bool:
    """Write operations a second against operations a byte, under the measured ceilings.

    Returns:
        False, and no file, if no row has both, or no session ceilings.
    """
    known = [entry for entry in entries if entry.row.seconds and entry.row.flops and entry.row.bytes]
    roofs = {name: roof for entry in known for name, roof in entry.session.ceilings.items()}
    if not known or not roofs:
        return False
    width = 8.0
    figure = style.new_figure(width, 5.2, title)
    axes = figure.add_subplot()
    handles: dict[str, Any] = {}
    intensities = [(entry.row.flops or 0) / (entry.row.bytes or 1) for entry in known]
    ridges = [roof.flops_per_s / roof.bytes_per_s for roof in roofs.values()]
    low, high = min([*intensities, *ridges]) / 2, max([*intensities, *ridges]) * 2
    for name, roof in roofs.items():
        ridge = roof.flops_per_s / roof.bytes_per_s
        ends = [low, ridge, high]
        (handles[f"{name}: ceilings, measured"],) = axes.plot(
            ends, [min(roof.flops_per_s, at * roof.bytes_per_s) / 1e12 for at in ends], **style.LIMIT
        )
    for index, label in enumerate(dict.fromkeys(entry.label for entry in entries)):
        mine = [entry.row for entry in known if entry.label == label]
        if mine:
            look = {"color": style.colour(index), "marker": style.marker(index), "markersize": 5, "linestyle": ""}
            x = [(row.flops or 0) / (row.bytes or 1) for row in mine]
            y = [(row.flops or 0) / (row.seconds or 1) / 1e12 for row in mine]
            (handles[label],) = axes.plot(x, y, **look)
    axes.set(xlabel="operations a byte (log scale)", ylabel="TFLOP/s (log scale)")
    style.log_axis(axes.xaxis, intensities)
    style.log_axis(axes.yaxis, [roof.flops_per_s for roof in roofs.values()])
    style.tidy(axes)
    style.legend(figure, handles, width)
    style.save(figure, path)
    return True


def _words(size: str) -> str:
    return {"q_len": "new tokens a request", "keys": "keys", "s_kv": "keys"}.get(size, size.replace("_", " "))
