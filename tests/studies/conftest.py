import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A layer that any machine runs in a millisecond, timed once.
SMALL = (
    "--device", "cpu", "--dim", "32", "--heads", "2", "--nope-dims", "16", "--rope-dims", "8", "--v-dims", "16",
    "--q-lora-rank", "16", "--kv-lora-rank", "16", "--trials", "1", "--warmup", "0",
)  # fmt: skip


@pytest.fixture
def small() -> list[str]:
    return list(SMALL)


@pytest.fixture
def mlakit(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the command in an empty folder; returns the finished process."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        return subprocess.run(
            [sys.executable, "-m", "mlakit", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )

    return run


@pytest.fixture
def replace_attend(monkeypatch) -> Callable[..., None]:
    """Replaces the attention of an implementation by `spoil(attend)`."""

    def replace(implementation: str, spoil: Callable) -> None:
        from mlakit.nn import mla

        monkeypatch.setitem(mla._ATTEND, implementation, spoil(mla._ATTEND[implementation]))

    return replace
