"""Attention and layers over several GPUs, by NCCL."""

import re
import time

import pytest
import torch

from mlakit.distributed.group import LOST
from mlakit.distributed.launch import launch
from tests.gpu import distributed_cases as cases

FOUND = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(FOUND < 2, reason=f"left out: needs two GPUs, PyTorch sees {FOUND}"),
]


def test_ranks_agree_with_one(tmp_path):
    ranks = 4 if FOUND >= 4 else 2
    code = launch(cases.run_all, ranks, tmp_path, 100.0, timeout=20.0)
    print("\n".join(f"{path.name}: {path.read_text().split()}" for path in sorted(tmp_path.glob("done*"))))
    words = sorted((*tmp_path.glob("failed*"), *tmp_path.glob("stuck*")))
    assert "\n\n".join(path.read_text() for path in words) == ""
    done = [(tmp_path / f"done{rank}").read_text().split()[::2] for rank in range(ranks)]
    assert done == [[case.__name__ for case in cases.CASES]] * ranks
    assert code == 0


# The GPU of the one that is left waits for the other's results, in steps that the host enqueues or replays.
@pytest.mark.parametrize("doing", ["decode", "graph"])
def test_a_dead_rank_ends_one_that_waits_for_its_gpu(doing, tmp_path):
    timeout = 6.0
    begin = time.monotonic()
    assert launch(cases.lose_a_rank, 2, 1, doing, tmp_path, timeout, timeout=2 * timeout) == LOST
    lines = (tmp_path / "words").read_text().splitlines()
    stack = "\n".join(path.read_text() for path in sorted(tmp_path.glob("stuck*")))
    assert [line for line in lines if line.startswith("mlakit: ")] != [], stack
    (line,) = [line for line in lines if line.startswith("mlakit: ")]
    assert re.fullmatch(
        r"mlakit: rank 0: (rank 1 has not been heard of for \d+ s|another rank is gone \(.+\)); ending", line
    )
    assert time.monotonic() - begin < 60  # and not NCCL's ten minutes
