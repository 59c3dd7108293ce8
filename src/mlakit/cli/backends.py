"""`mlakit backends`: what can be measured here, and what not, and why."""

import argparse
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


def run(args: argparse.Namespace) -> int:
    """Run it."""
    from mlakit.backends import registry
    from mlakit.bench.runner import list_backends
    from mlakit.bench.table import make_console

    device, rows = list_backends(args.device)
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = make_console()
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=f"backends on {device}", title_justify="left"
    )
    for title in ("name", "kind", "hardware", "available", "parameters"):
        table.add_column(title, overflow="fold", no_wrap=title == "name")
    for row in rows:
        found = Text(row["version"], style="green") if row["version"] else Text(f"no: {row['reason']}", style="yellow")
        parameters = ", ".join(f"{name} {values}" for name, values in row.get("parameters", {}).items())
        table.add_row(row["name"], row["kind"], row["hardware"], found, parameters)
    for name, kinds in registry.WITHOUT_ADAPTER.items():
        table.add_row(
            name,
            " and ".join(sorted(kinds)),
            "",
            Text("no: mlakit has no adapter for it in this version", style="yellow"),
            "",
        )
    console.print(table)
    return 0
