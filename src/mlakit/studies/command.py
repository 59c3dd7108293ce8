"""What a study does as a command: its parser and exit codes, a bar while it runs."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def run_study(
    prog: str,
    description: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """A study as a command of its own; returns the exit code (2 for bad input, with one line on stderr; 130 if
    interrupted).
    """
    parser = _Parser(prog=prog, description=(description or "").partition("\n\n")[0], allow_abbrev=False)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


@contextmanager
def progress(total: int, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A bar on standard error while a study runs, nothing if that is no terminal or with `quiet`; yields what to call
    before each of `total` pieces of work, with its name.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), text)
    # Printed rows go above the bar where both are on one terminal, and where rows go to a file they stay out of it.
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),
    )
    task = bar.add_task("building", total=total)
    begun = 0

    def begin(name: str) -> None:
        nonlocal begun
        bar.update(task, completed=begun, description=name)
        begun += 1

    with bar:
        yield begin
