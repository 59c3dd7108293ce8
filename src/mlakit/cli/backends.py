"""`mlakit backends`: what can be measured here, and what not, and why."""

import argparse
from collections.abc import Sequence
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "backends",
        help="list backends: available, or the reason why not",
        description="List every backend: its kind, hardware and version, or the reason why it cannot run on a device.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="cuda:0, cpu or auto (default)")
    parser.set_defaults(run=run)


# Below so many characters the cells of a table would break words; then each backend is a paragraph.
_TABLE_WIDTH = 120


def run(args: argparse.Namespace) -> int:
    """Run it."""
    from mlakit.backends import registry
    from mlakit.bench.runner import list_backends
    from mlakit.bench.table import make_console

    device, rows = list_backends(args.device)
    lines = [
        (
            row["name"],
            row["kind"],
            row["hardware"],
            row["version"] or f"no: {row['reason']}",
            ", ".join(f"{name} {values}" for name, values in row.get("parameters", {}).items()),
            bool(row["version"]),
        )
        for row in rows
    ]
    lines += [
        (name, " and ".join(sorted(kinds)), "", "no: mlakit has no adapter for it in this version", "", False)
        for name, kinds in registry.WITHOUT_ADAPTER.items()
    ]
    console = make_console()
    _show(console, f"backends on {device}", lines, as_table=console.width >= _TABLE_WIDTH)
    return 0


def _show(console: Any, title: str, lines: Sequence[tuple[str, str, str, str, str, bool]], *, as_table: bool) -> None:
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title, title_justify="left")
    for heading in ("name", "kind", "hardware", "available", "parameters"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    if not as_table:
        console.print(Text(title))
    for name, kind, hardware, found, parameters, is_there in lines:
        shown = Text(found, style="green" if is_there else "yellow")
        if as_table:
            table.add_row(name, kind, hardware, shown, parameters)
            continue
        console.print(Text.assemble((name, "bold"), f": {'; '.join(filter(None, (kind, hardware)))}"))
        for part in (shown, Text(parameters)):
            if part:
                console.print(Padding(part, (0, 0, 0, 2)))
    if as_table:
        console.print(table)
