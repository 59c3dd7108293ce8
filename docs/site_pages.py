"""Pages of the site that are no files of their own: README as the first page, and the help of every command.

A hook of mkdocs (mkdocs.yml names it); nothing of mlakit imports it.
"""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {"index.md": home((ROOT / "README.md").read_text()), "commands.md": commands()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def home(readme: str) -> str:
    """README with links as the site's: into docs they lose their folder, out of docs only their words are left."""

    def link(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        if target.startswith("docs/"):
            return f"{image}[{words}]({target.removeprefix('docs/')})"
        return words

    return _LINK.sub(link, readme)


def commands() -> str:
    """What `--help` says of every command and study."""
    os.environ["COLUMNS"] = "100"  # argparse wraps its help to this
    os.environ["NO_COLOR"] = "1"
    from mlakit.cli.main import build_parser

    sections = [f"## {parser.prog}\n\n```text\n{parser.format_help()}```\n" for parser in _all(build_parser())]
    return "# Commands\n\nAs `--help` prints it.\n\n" + "\n".join(sections)


def _all(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _all(inner)
