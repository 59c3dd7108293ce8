import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def mlakit(tmp_path):
    """Runs the command in an empty folder; returns the finished process."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        path = f"{SUPPORT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        return subprocess.run(
            [sys.executable, "-m", "mlakit", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )

    return run
