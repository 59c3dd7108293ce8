"""What a study does as a command: its parser and exit codes, a folder for its files, a bar while it runs."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NoReturn

RUNS = Path("mlakit-runs")


def output_folder(path: Path | None, study: str, flag: str) -> Path:
    """The folder to write into, made if need be: as told, else a new one under `mlakit-runs`.

    Raises:
        ValueError: it cannot be made or is a file.
    """
    folder = path or RUNS / f"{study}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag}: cannot make the folder {str(folder)!r}: {error.strerror or error}") from None
    return folder


def output_file(path: Path | None, flag: str) -> Path | None:
    """The file to write, with its folder made if need be.

    Raises:
        ValueError: it is a folder, or its folder cannot be made.
    """
    if path is not None and path.is_dir():
        raise ValueError(f"{flag}: {str(path)!r} is a folder; expected a file to write to")
    if path is not None:
        output_folder(path.parent, "", flag)
    return path


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
