"""`mlakit recommend`: the backend and settings to use for your workloads, measured here."""

import argparse
from typing import Any

from mlakit.studies import row_flags

_EXAMPLES = """\
examples:
  mlakit recommend --model deepseek-v3 --tp 8 --batch-specs 64q1s4k 16q4s4k "2q2k_32q1s1k"
  mlakit recommend --config production_mix
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "recommend",
        help="which backend and settings to use for your workloads, by measuring them here",
        description="Measure what is available here on your workloads, try the settings of what comes close to the "
        "fastest, and print what to use for each, with the measured margin; a tie is called a tie.",
        epilog=_EXAMPLES,
        allow_abbrev=False,
    )
    parser.add_argument("--batch-specs", nargs="+", metavar="SPEC", help="your workloads, one batch each")
    parser.add_argument("--config", metavar="NAME|FILE", help="take batches and model of a config (mlakit configs)")
    parser.add_argument(
        "--scope",
        choices=["attention", "pipeline"],
        help="attention alone, or with the projections around it (default: attention for batches of plain decode, "
        "where all pipelines start alike, pipeline for the others)",
    )
    parser.add_argument(
        "--tune", action=argparse.BooleanOptionalAction, default=True, help="try the settings of backends close to best"
    )
    row_flags.add_arguments(parser, backends="all that compute the model's attention")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it."""
    from mlakit.studies.recommend import run as recommend

    return recommend(args)
