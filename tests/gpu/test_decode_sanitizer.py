"""`mla_decode`'s kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlakit.hardware import capability

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).parent / "sanitize_decode.py"
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


# racecheck does not see what mbarriers order between warpgroups of a program: of the kernel for many heads, whose two
# exchange maxima, factors and weights so, it reports just those exchanges. The kernel for few heads has one warpgroup.
@pytest.mark.parametrize(
    ("tool", "group"), [("memcheck", "hopper"), ("memcheck", "triton"), ("racecheck", "few"), ("racecheck", "triton")]
)
def test_no_error(tool: str, group: str) -> None:
    if not os.access(SANITIZER, os.X_OK):
        pytest.skip("compute-sanitizer is not installed")
    if group != "triton" and capability("cuda") != (9, 0):
        pytest.skip("these kernels are for compute capability 9.0")
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "86", sys.executable, str(SCRIPT), group]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "right: " in done.stdout
