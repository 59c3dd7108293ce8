"""`mlakit configs`: the configs that come with mlakit."""

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "configs",
        help="list the packaged configs",
        description="List the configs that --config takes by name. To copy one: mlakit configs --show NAME > mine.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("--show", metavar="NAME", help="print one config's YAML")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it."""
    from mlakit.bench import config_file

    if args.show:
        print(config_file.find(args.show).read_text(), end="")
        return 0
    from rich import box
    from rich.table import Table

    from mlakit.bench.table import make_console

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("config", "batches", "what it measures"):
        justify: Any = "right" if title == "batches" else "left"
        table.add_column(title, no_wrap=title == "config", justify=justify, overflow="fold")
    for name in config_file.packaged():
        content = config_file.load(name).content
        table.add_row(name, str(len(content.specs())), content.description)
    make_console().print(table)
    return 0
