"""Attention and layers over two GPUs, by NCCL."""

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


def test_two_gpus_agree_with_one(tmp_path):
    code = launch(cases.run_all, 2, tmp_path, 100.0, timeout=20.0)
    assert "\n\n".join(path.read_text() for path in sorted(tmp_path.glob("failed*"))) == ""
    done = [(tmp_path / f"done{rank}").read_text().split() for rank in range(2)]
    assert done == [[case.__name__ for case in cases.CASES]] * 2
    assert code == 0


def test_a_dead_rank_ends_one_that_waits_for_its_gpu(tmp_path):
    words, timeout = tmp_path / "words", 8.0
    begin = time.monotonic()
    assert launch(cases.lose_a_rank, 2, 1, words, timeout, timeout=3 * timeout) == LOST
    (line,) = [line for line in words.read_text().splitlines() if line.startswith("mlakit: ")]
    assert re.fullmatch(
        r"mlakit: rank 0: (rank 1 has not been heard of for \d+ s|another rank is gone \(.+\)); ending", line
    )
    assert time.monotonic() - begin < 60  # and not NCCL's ten minutes
