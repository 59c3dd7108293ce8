"""A study that is interrupted: its record holds what is done, and the same command with --resume does the rest."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlakit.bench.files import keep_earlier


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags `--resume` and `--quiet` to a study's parser."""
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the record that an interrupted run left: only what is missing is measured",
    )
    group.add_argument("--quiet", action="store_true", help="no progress, and no word on files that are saved")


def read_earlier(path: Path | None, schema: str, *, resume: bool, flag: str) -> dict[str, Any] | None:
    """The record to go on with, None without `resume`; `path` is None if `flag` does not say where it is.

    Raises:
        ValueError: there is nothing to go on with.
    """
    if not resume:
        return None
    if path is None:
        raise ValueError(f"--resume needs {flag}: the record to go on with")
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"nothing to resume: {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise ValueError(f"{path} is no record of this study: expected schema {schema}")
    return found


def go_on(found: dict[str, Any] | None, path: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """What is measured already, in "rows", for a `record` that is to be at `path` and begins now.

    Without an earlier one a record that is there is kept under another name, ending in .bak.

    Raises:
        ValueError: `found` was measured with another "environment" or other "options" than `record` names.
    """
    if found is None:
        if path is not None:
            keep_earlier(path)
        return {"rows": []}
    now = json.loads(json.dumps(record))  # tuples are lists in a file
    threads = (found.get("environment") or {}).get("threads")
    if isinstance(threads, int) and threads > 0:
        _take_threads(now, threads)
        _take_threads(record, threads)
    for part in ("environment", "options"):
        before, after = found.get(part) or {}, now[part]
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                then, here = _short(before.get(name)), _short(after.get(name))
                raise ValueError(
                    f"{path} was measured with {name} {then}, and this is {here}: it cannot be gone on with"
                )
    return found


def _take_threads(record: dict[str, Any], threads: int) -> None:
    """Go on with as many CPU threads as before, whatever other processes leave free now: times depend on it."""
    import torch

    torch.set_num_threads(threads)
    record["environment"] = {**record["environment"], "threads": threads}
    if "cpu_threads" in record and record["cpu_threads"] is not None:
        record["cpu_threads"] = threads


def _short(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


@contextmanager
def resumable(path: Path | None, flags: Sequence[str] = (), *, other: str = "--output-json FILE") -> Iterator[None]:
    """Say on Ctrl-C where what is done is, and the command that does the rest.

    Args:
        path: the record, None if none is written.
        flags: what that command needs besides, where it was not said: the folder that was made for the run.
        other: what would have kept a record.
    """
    try:
        yield
    except KeyboardInterrupt:
        if path is None:
            print(f"interrupted; nothing is saved, as {other} was not given", file=sys.stderr)
        elif not path.exists():
            print("interrupted before anything was done", file=sys.stderr)
        else:
            called = Path(sys.argv[0])
            command = (
                ["python", "-m", f"mlakit.studies.{called.stem}"] if called.parent.name == "studies" else ["mlakit"]
            )
            words = [*command, *sys.argv[1:], *flags]
            again = shlex.join([*words, *([] if "--resume" in words else ["--resume"])])
            print(f"interrupted; what is done is in {path}. To go on: {again}", file=sys.stderr)
        raise
