"""`mlakit limits`: what this device can do at best, measured now."""

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "limits",
        help="measure this device's ceilings",
        description="Measure the ceilings that rows are compared with: copy and read bandwidth, matrix product rate.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="cuda:0, cpu or auto (default)")
    parser.add_argument(
        "--dtype", nargs="+", choices=["bf16", "fp16", "fp32"], default=["bf16", "fp32"], help="dtypes of the product"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and operations a second")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it."""
    import json

    from mlakit.bench.progress import Progress
    from mlakit.bench.runner import probe
    from mlakit.bench.table import make_console
    from mlakit.bench.units import rate

    with Progress(make_console(stderr=True), quiet=args.json) as progress:
        device = probe(args.device, args.dtype, progress)
    if args.json:
        print(json.dumps({"device": device.environment["device"], "ceilings": device.ceilings}, indent=1))
        return 0
    memory = next(iter(device.ceilings.values()))
    print(f"{device.environment['device']['name']} ({device.name})")
    print(f"  copy         {rate(memory['copy_bytes_per_s'], 'B/s')}, read and written")
    print(f"  read         {rate(memory['read_bytes_per_s'], 'B/s')}")
    for dtype, ceilings in device.ceilings.items():
        print(f"  {dtype} product {rate(ceilings['flops_per_s'], 'FLOP/s')}")
    return 0
