import subprocess
from collections.abc import Callable

import pytest

from tests.support.command import run_command


@pytest.fixture
def mlakit(tmp_path, monkeypatch) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the command in an empty folder; returns what a finished process would."""
    return lambda *arguments: run_command(tmp_path, monkeypatch, *arguments)
