"""What the command's exit codes mean, for all of its subcommands: scripts and CI jobs rely on them."""

import textwrap

DONE = 0
FAILED = 1
BAD_INPUT = 2
BROKEN_DEVICE = 3
LOST_RANK = 4
BUG = 70
INTERRUPTED = 130

MEANINGS = {
    DONE: "done",
    FAILED: "done, and the answer is no: nothing could be measured, a study of implementations found one wrong, "
    "compare found a regression, or a document is stale",
    BAD_INPUT: "bad input, or a file that cannot be read or written; one line says what was expected",
    BROKEN_DEVICE: "the device does not work",
    LOST_RANK: "one of several ranks was lost; each of the others says so in a line",
    BUG: "a bug in mlakit; please report the traceback",
    INTERRUPTED: "interrupted (Ctrl-C); what was measured is kept, and a line says how to go on",
}


def table(width: int) -> str:
    """All of them, in lines of at most so many characters."""
    lines = []
    for code, meaning in MEANINGS.items():
        lines += textwrap.wrap(meaning, width, initial_indent=f"  {code:<4} ", subsequent_indent=" " * 7)
    return "\n".join(lines)
