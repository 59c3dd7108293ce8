"""The command's entry: parses arguments, runs a subcommand, turns errors of the user's into one line."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mlakit import __version__
from mlakit.cli import backends, bench, configs, env, limits, study

_SUBCOMMANDS = (bench, study, backends, configs, limits, env)

BAD_INPUT = 2
BROKEN_DEVICE = 3
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake; argparse would print the whole usage first."""
        fail(f"{message} (see {self.prog} --help)")


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """End with a line on standard error and an exit code."""
    line = " ".join(message.split())
    print(f"mlakit: error: {line}", file=sys.stderr)
    raise SystemExit(code)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = _Parser(
        prog="mlakit",
        description="Multi-head Latent Attention: any attention backend, ours or a peer's, measured on any batch, "
        "checked before it is timed.",
        epilog="First steps: mlakit bench --config quickstart",
    )
    parser.add_argument("--version", action="version", version=f"mlakit {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=_Parser)
    for module in _SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 fine, 1 nothing succeeded, 2 bad input, 3 a device that does
    not work, 130 interrupted.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return int(args.run(args))
    except ValueError as error:
        fail(_message(error))
    except RuntimeError as error:
        from mlakit.bench.process import DeviceError  # here, as most commands end without

        if not isinstance(error, DeviceError):
            raise
        fail(str(error), BROKEN_DEVICE)
    except KeyboardInterrupt:
        print("mlakit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (mlakit ... | head). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _message(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return str(error)
    first = errors()[0]  # pydantic's: several lines, with a link
    name = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{name}: {message}, got {first['input']!r}" if name else message
