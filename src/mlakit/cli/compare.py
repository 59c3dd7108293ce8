"""`mlakit compare`: two records, or two revisions measured in turn."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mlakit.cli.bench import add_measuring, flags

_EXAMPLES = """\
examples:
  mlakit compare before.json after.json
  mlakit compare before.json after.json --fail-above 5% --output-csv compare.csv
  mlakit compare --worktree main --backend mlakit --batch-specs 32q1s4k --fail-above 3%
  mlakit compare --worktree HEAD~5 --config quickstart

The ratio is B's time over A's, with its 95% interval.
  SAME     the whole interval is nearer to 1 than --same-within
  FASTER   B is faster by all of the interval; SLOWER: it is slower
  UNSURE   the interval holds 1, and more than --same-within beside it
  LOST     A has a time and B has none (wrong result, crash, ...); GAINED: the other way round

--worktree REV checks REV out into a temporary folder and measures REV (A) and the checkout that this mlakit runs from
(B), with what is not committed in it, in turn: rounds of a few samples each, so that what slows the machine down slows
both. --repeats is then the number of passes over the layers in a round.

With --fail-above 5% the exit code is 1 if all of a row's interval lies above 1.05, or if B fails at a row that has a
time in A. Without it, and for what one side alone has, it is 0.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="what got faster or slower between two records, or two revisions",
        description="Compare two records of mlakit bench, of a study or of make bench-h200; or measure two revisions "
        "in turn and compare them.",
        epilog=_EXAMPLES,
        allow_abbrev=False,
    )
    parser.add_argument("records", nargs="*", type=Path, metavar="RECORD.json", help="two records: A, then B")
    parser.add_argument("--worktree", metavar="REV", help="instead: measure this revision and the checkout in turn")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="with --worktree: turns that each side gets, 6 at least (default: 12)"
    )
    parser.add_argument(
        "--fail-above", metavar="PERCENT", help="exit with 1 if B is slower than A by more than this, 5%% say"
    )
    parser.add_argument(
        "--same-within", metavar="PERCENT", default="2%", help="smaller differences count as none (default: 2%%)"
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="save the comparison as JSON")
    parser.add_argument("--output-csv", type=Path, metavar="FILE", help="save the comparison as CSV, a line a row")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes; the table and warnings only")
    add_measuring(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it."""
    from mlakit.cli import compare_run

    given = flags(args)
    if args.worktree is None:
        if given or args.config or args.rounds is not None:
            raise ValueError("flags that say what to measure, and --rounds, go with --worktree REV")
        return compare_run.of_records(args)
    if args.records:
        raise ValueError("give two records, or --worktree REV, not both")
    return compare_run.of_revisions(args, given, sys.argv[1:])
