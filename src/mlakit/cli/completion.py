"""`mlakit completion SHELL`: completion of commands, flags, backends, configs and models."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")
_HOW = """\
to have it in every new shell, add the line for yours:
  ~/.bashrc                   eval "$(mlakit completion bash)"
  ~/.zshrc                    eval "$(mlakit completion zsh)"       (after compinit)
  ~/.config/fish/config.fish  mlakit completion fish | source
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "completion",
        help="print the code that completes mlakit's commands in a shell",
        description="Print the code that makes a shell complete mlakit's commands, flags, backends, configs and "
        "models.",
        epilog=_HOW,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it."""
    import argcomplete

    if sys.stdout.isatty():
        print(_HOW, file=sys.stderr)
    print(argcomplete.shellcode(["mlakit"], shell=args.shell))
    return 0


def answer(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks for completions of its command line, and end."""
    import argcomplete

    for action in _actions(parser):
        if action.dest in _VALUES:
            action.completer = _VALUES[action.dest]  # type: ignore[attr-defined] # argcomplete's protocol
    argcomplete.autocomplete(parser, always_complete_options=False, exit_method=sys.exit)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                yield from _actions(inner)


def _backends(**_: Any) -> list[str]:
    from mlakit.backends import registry

    return registry.names()


def _packaged(**_: Any) -> list[str]:
    from mlakit.bench import config_file

    return list(config_file.packaged())


def _configs(prefix: str, **_: Any) -> Iterable[str]:
    return [*_packaged(), *_files(prefix, ".yaml", ".yml")]


def _records(prefix: str, **_: Any) -> Iterable[str]:
    return _files(prefix, ".json")


def _files(prefix: str, *endings: str) -> Iterator[str]:
    """Folders, and files of these endings, that begin so."""
    folder = prefix[: prefix.rfind("/") + 1]
    for path in sorted(Path(folder or ".").glob("*")):
        if path.is_dir() or path.suffix in endings:
            yield f"{folder}{path.name}{'/' if path.is_dir() else ''}"


def _models(**_: Any) -> list[str]:
    from mlakit.dims import MLA_PRESETS, STANDARD_PRESETS

    return [*MLA_PRESETS, *STANDARD_PRESETS]


# By the name of the argument, the same in every subcommand.
_VALUES: dict[str, Callable[..., Iterable[str]]] = {
    "backend": _backends,
    "backends": _backends,
    "config": _configs,
    "show": _packaged,
    "model": _models,
    "records": _records,
    "device": lambda **_: ["auto", "cpu", "cuda:0"],
}
