"""`mlakit study NAME`: the named experiments."""

from typing import Any

from mlakit.studies import k_concat


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "study",
        help="run a named experiment",
        description="Run a named experiment; each prints a conclusion computed from what it measured.",
        allow_abbrev=False,
    )
    studies = parser.add_subparsers(title="studies", metavar="NAME", dest="study", required=True)
    concat = studies.add_parser(
        "k-concat",
        help="torch.cat against direct copy against our kernel for building MLA's keys",
        description="Time torch.cat, slice assignment and mlakit's kernel building MLA's keys [B, heads, nope + rope].",
        allow_abbrev=False,
    )
    k_concat.add_arguments(concat)
    concat.set_defaults(run=k_concat.run)
