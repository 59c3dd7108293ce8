# PYTHON_ARGCOMPLETE_OK
"""The command's entry: parses arguments, runs a subcommand, turns errors of the user's into one line."""

import argparse
import difflib
import io
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from mlakit import __version__
from mlakit.cli import backends, bench, compare, completion, configs, env, exit_codes, limits, recommend, report, study

_SUBCOMMANDS = (bench, recommend, report, compare, study, backends, configs, limits, env, completion)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs are filled, lists with indented lines stay as they are, and the longest command fits its column."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part.rstrip() if "\n " in part else textwrap.fill(part, width) for part in text.split("\n\n")
        )

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2  # argparse forgets that commands are indented once more


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **kwargs})

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, but for flags that are not there: argparse leaves them to the parser of the whole command,
        which knows neither this one's help nor its flags.
        """
        found, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake; argparse would print the whole usage first."""
        fail(f"{message} (see {self.prog} --help)")


def fail(message: str, code: int = exit_codes.BAD_INPUT) -> NoReturn:
    """End with a line on standard error and an exit code."""
    line = " ".join(message.split())
    print(f"mlakit: error: {line}", file=sys.stderr)
    raise SystemExit(code)


def build_parser(*, studies: bool = True) -> argparse.ArgumentParser:
    """The parser of the whole command; without the flags of `studies`, whose modules take 0.1 s to import."""
    parser = _Parser(
        prog="mlakit",
        description="Multi-head Latent Attention: any attention backend, ours or a peer's, measured on any batch, "
        "checked before it is timed.",
        epilog="first steps:\n  mlakit bench --config quickstart\n  mlakit COMMAND --help\n\n"
        f"exit codes:\n{exit_codes.table(max(40, shutil.get_terminal_size().columns - 2))}\n",
    )
    parser.add_argument("--version", action="version", version=f"mlakit {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=_Parser)
    for module in _SUBCOMMANDS:
        if module is study:
            study.add_parser(subparsers, studies=studies)
        else:
            module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, one of `exit_codes`."""
    words = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without a µ gets a question mark: what was measured is not lost for a letter.
        sys.stdout.reconfigure(errors="replace")
    if "_ARGCOMPLETE" in os.environ:
        completion.answer(build_parser())
    parser = build_parser(studies="study" in words)
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help()
        return exit_codes.DONE
    try:
        return int(args.run(args))
    except ValueError as error:
        fail(_message(error))
    except KeyboardInterrupt:
        print("mlakit: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (mlakit ... | head). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return exit_codes.DONE
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        from mlakit.bench.process import DeviceError  # here, as most commands end without

        if isinstance(error, DeviceError):
            fail(str(error), exit_codes.BROKEN_DEVICE)
        traceback.print_exc()
        return exit_codes.BUG


def _message(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return str(error)
    first = errors()[0]  # pydantic's: several lines, with a link
    name = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    given = first["input"]
    if isinstance(given, str) and any(quoted in message for quoted in (repr(given), f'"{given}"')):
        return f"{name}: {message}"  # one of ours, which says it
    return f"{name}: {message}, got {given!r}"
