"""Another revision of the checkout that this mlakit runs from, in a temporary folder. No torch here."""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlakit


@dataclass(frozen=True)
class Revision:
    """A revision that is checked out: what it was called, its commit, and the folder to import mlakit from."""

    name: str
    commit: str
    subject: str
    source: Path


@contextmanager
def checked_out(revision: str) -> Iterator[Revision]:
    """Check a revision out beside the checkout (`git worktree`), and remove it again however the block ends: by
    itself, an error, Ctrl-C or a `kill`.

    Raises:
        ValueError: mlakit runs from no checkout, git knows no such revision, or that has no bench to measure with.
    """
    package = Path(mlakit.__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        raise ValueError(f"--worktree: mlakit must run from a git checkout, and this one is installed in {package}")
    root = Path(top).resolve()
    if root == package:
        raise ValueError(f"--worktree: expected a checkout with mlakit in a folder of it, and {package} is all of it")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise ValueError(f"--worktree: git knows no revision {revision!r}")
    inside = package.relative_to(root)
    if _git(root, "cat-file", "-e", f"{commit}:{(inside / 'bench' / 'worker.py').as_posix()}") is None:
        raise ValueError(f"--worktree: {revision} has no {inside / 'bench' / 'worker.py'} to measure with")
    folder = Path(tempfile.mkdtemp(prefix="mlakit-worktree-"))
    tree = folder / "tree"
    with _terminated_as_interrupted():
        try:
            if _git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit) is None:
                raise ValueError(f"--worktree: git cannot check {revision} out into {tree}")
            subject = _git(root, "log", "-1", "--format=%s", commit) or ""
            yield Revision(revision, commit[:12], subject, (tree / inside).parent)
        finally:
            with _uninterrupted():
                _git(root, "worktree", "remove", "--force", "--force", str(tree))
                shutil.rmtree(folder, ignore_errors=True)
                _git(root, "worktree", "prune")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None if it fails or is not there."""
    # Git's own variables would name another repository: this may run in a hook. And a Ctrl-C at the terminal is ours.
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            start_new_session=True,
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """What ends a job in CI is SIGTERM, of which Python would die at once, and leave the folder behind."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with _handler(signal.SIGTERM, interrupt):
        yield


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave half of the folder behind."""
    with _handler(signal.SIGINT, signal.SIG_IGN), _handler(signal.SIGTERM, signal.SIG_IGN):
        yield


@contextmanager
def _handler(number: signal.Signals, handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
