"""The temporary folder of a cluster that mlakit starts itself."""

import subprocess
import sys
from pathlib import Path

from mlakit.distributed.ray_connection import Folder

KILLED = """
import os, pathlib, signal, sys
from mlakit.distributed.ray_connection import Folder
mine = Folder(sys.argv[1])
pathlib.Path(mine.path, "session").mkdir()
print(mine.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path):
    (tmp_path / "mlakit-ray-of-somebody").mkdir()  # which says nothing of who needs it
    living = Folder(str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    assert (left / "session").is_dir(), killed.stderr
    mine = Folder(str(tmp_path))
    assert not left.exists()
    assert sorted(tmp_path.iterdir()) == sorted(
        map(Path, (mine.path, living.path, tmp_path / "mlakit-ray-of-somebody"))
    )
    mine.remove()
    living.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["mlakit-ray-of-somebody"]
