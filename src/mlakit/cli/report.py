"""`mlakit report`: records as a page to look at, as Markdown, as plots; and documents that hold such tables."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_VALUES = ("time", "host", "limit", "tflops", "bandwidth", "memory", "conclusions")
_EXAMPLES = """\
examples:
  mlakit report mlakit-runs/quickstart-20261122-101500 -o report.html
  mlakit report results/h200/*.json -o h200.html --baseline flash_mla
  mlakit report before.json after.json --markdown > tables.md
  mlakit report results/h200/layer.json --markdown --value memory
  mlakit report results/h200/dense_decode.json --plot plots --baseline flash_mla
  mlakit report --update README.md docs/kernels.md --check

A record is what mlakit bench, mlakit study NAME --output-json or make bench-h200 wrote; of a run's folder it is the
record.json in it. The page is one file that needs no network; an HTML report needs: pip install 'mlakit[report]'
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "report",
        help="a page, tables or plots from records",
        description="Show records: as an HTML page with figures and tables to filter and sort, as tables in "
        "Markdown, or as PNG plots.",
        epilog=_EXAMPLES,
        allow_abbrev=False,
    )
    parser.add_argument("records", nargs="*", type=Path, metavar="RECORD", help="records (.json), or folders of runs")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the page (default: report.html, unless --markdown or --plot)"
    )
    parser.add_argument("--baseline", metavar="BACKEND", help="what speed-ups refer to (default: the fastest other)")
    parser.add_argument("--title", metavar="TEXT", help="the page's head line")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--operations", nargs="+", metavar="NAME", help="with --markdown: these alone")
    parser.add_argument("--value", choices=_VALUES, help="with --markdown: what cells hold (default: time)")
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="write a PNG for each operation and question into this folder"
    )
    parser.add_argument(
        "--update", nargs="+", type=Path, metavar="DOCUMENT", help="make the tables between a document's markers anew"
    )
    parser.add_argument(
        "--check", action="store_true", help="with --update: change nothing, exit with 1 if one is stale"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it."""
    if args.update:
        others = (
            args.records,
            args.output,
            args.markdown,
            args.plot,
            args.baseline,
            args.title,
            args.operations,
            args.value,
        )
        if any(others):
            raise ValueError("--update takes all else from the documents' markers; give it documents, and --check")
        return _update(args.update, args.check)
    if args.check:
        raise ValueError("--check goes with --update DOCUMENT")
    if (args.operations or args.value) and not args.markdown:
        raise ValueError("--operations and --value go with --markdown")
    from mlakit.report.load import load_records

    records = load_records(args.records)
    output = args.output or (None if args.markdown or args.plot else Path("report.html"))
    if args.title and output is None:
        raise ValueError("--title is the page's: it goes with -o FILE")
    if output is not None:
        _page(args, records, output)
    if args.plot is not None:
        _plots(args, records)
    if args.markdown:
        from mlakit.report.grid import TableOptions
        from mlakit.report.markdown import markdown_report

        baseline = (args.baseline,) if args.baseline else ()
        options = TableOptions(tuple(args.operations or ()), baseline=baseline, value=args.value or "time")
        print(markdown_report(records, options), end="")
    return 0


def _page(args: argparse.Namespace, records: Sequence[Any], output: Path) -> None:
    from mlakit.bench.files import output_file, write_atomically
    from mlakit.report.html import render_html

    if output.suffix == ".json":
        raise ValueError(f"-o: {str(output)!r} would be taken for a record; expected a page, such as report.html")
    page = render_html(records, baseline=args.baseline, title=args.title)
    output_file(output, "-o")
    try:
        write_atomically(output, page)
    except OSError as error:
        raise ValueError(f"-o: cannot write {str(output)!r}: {error.strerror or error}") from None
    print(f"saved: {output}", file=sys.stderr)


def _plots(args: argparse.Namespace, records: Sequence[Any]) -> None:
    from mlakit.bench.files import output_folder
    from mlakit.report.plots import write_plots

    folder = output_folder(args.plot, "", "--plot")
    for path in write_plots(records, folder, baseline=args.baseline):
        print(f"saved: {path}", file=sys.stderr)


def _update(documents: Sequence[Path], check: bool) -> int:
    from mlakit.report.documents import update_documents

    stale = update_documents(documents, check=check)
    for path in stale:
        print(f"{'stale' if check else 'rewritten'}: {path}", file=sys.stderr)
    return 1 if check and stale else 0
