"""`mlakit env`: what a measurement here depends on."""

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "env",
        help="show device, driver and library versions",
        description="Show what a measurement here depends on: device, driver, libraries, commit.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="cuda:0, cpu or auto (default)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it."""
    import json

    from mlakit.bench.runner import probe

    environment = probe(args.device, []).environment
    if args.json:
        print(json.dumps(environment, indent=1))
        return 0
    device = environment.pop("device")
    for name, value in {**{f"device {k}": v for k, v in device.items()}, **environment}.items():
        print(f"{name:<20} {'-' if value is None else value}")
    return 0
