"""Groups of CPU ranks: attention and layers over them are what one rank computes, and a lost rank ends all.

A group is started once for all cases of its size: that takes longer than they do.
"""

import os
import re
import signal

import pytest

from mlakit.distributed.group import LOST, process_group
from mlakit.distributed.launch import launch
from tests.distributed import cases

# More than any case needs on a busy machine; a rank that fails costs the others this long.
PATIENCE = 60.0
SETTING = "NCCL_GRAPH_MIXING_SUPPORT"


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one(ranks, tmp_path):
    code = launch(cases.run_all, ranks, tmp_path, PATIENCE, timeout=PATIENCE)
    done = [(tmp_path / f"done{rank}").read_text().split() for rank in range(ranks)]
    failures = "\n\n".join(path.read_text() for path in sorted(tmp_path.glob("failed*")))
    assert failures == ""
    assert done == [[case.__name__ for case in cases.CASES]] * ranks
    assert code == 0


# The first rank, which serves no other as a meeting point, and the last; waiting for another or busy with themselves; a
# rank that its launcher ends, in the middle of a collective.
@pytest.mark.parametrize(
    ("victim", "number", "waiting"),
    [(0, signal.SIGKILL, True), (2, signal.SIGKILL, True), (2, signal.SIGKILL, False), (1, signal.SIGTERM, True)],
)
def test_a_dead_rank_ends_the_others_with_a_line(victim, number, waiting, capfd, tmp_path):
    words = tmp_path / "words"
    code = launch(cases.lose_a_rank, 3, victim, number, waiting, words, timeout=2 * cases.SHORT)
    assert code == LOST
    killed = number == signal.SIGKILL
    assert capfd.readouterr().err == (f"mlakit: rank {victim} was ended by SIGKILL\n" if killed else "")
    lines = words.read_text().splitlines()
    broken = r"another rank is gone \(.+\)"
    silent = r"rank \d has not been heard of for \d+ s"
    for rank in range(3):
        said = [line for line in lines if line.startswith(f"mlakit: rank {rank}: ")]
        if rank == victim:
            assert len(said) == (0 if killed else 1)
            assert killed or "told to end (SIGTERM)" in said[0]
            continue
        assert len(said) == 1, lines
        assert re.fullmatch(
            f"mlakit: rank {rank}: ({broken}|{silent}); ending" if waiting else f".*{silent}; ending", said[0]
        )
    assert len(lines) == (2 if killed else 3), lines


def test_what_a_rank_raises_is_not_hidden(tmp_path):
    words = tmp_path / "words"
    assert launch(cases.refuse, 2, words, timeout=cases.SHORT) == 2
    assert words.read_text() == "mlakit: error: no, got something else\n"


@pytest.mark.parametrize(("told", "found"), [(None, "0"), ("1", "1")])
def test_a_promise_about_graphs_is_passed_on(told, found, monkeypatch):
    """Unless the environment says otherwise."""
    monkeypatch.setenv(SETTING, told or "")
    if told is None:
        monkeypatch.delenv(SETTING)
    with process_group("cpu"):
        assert os.environ.get(SETTING) == told
    with process_group("cpu", graphs_alone=True):
        assert os.environ[SETTING] == found
