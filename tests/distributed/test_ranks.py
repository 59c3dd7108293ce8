"""Groups of CPU ranks: attention and layers over them are what one rank computes, and a lost rank ends all.

A group is started once for all cases of its size: that takes longer than they do.
"""

import re

import pytest

from mlakit.distributed.group import LOST
from mlakit.distributed.launch import launch
from tests.distributed import cases

# More than any case needs on a busy machine; a rank that fails costs the others this long.
PATIENCE = 60.0


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one(ranks, tmp_path):
    code = launch(cases.run_all, ranks, tmp_path, PATIENCE, timeout=PATIENCE)
    done = [(tmp_path / f"done{rank}").read_text().split() for rank in range(ranks)]
    failures = "\n\n".join(path.read_text() for path in sorted(tmp_path.glob("failed*")))
    assert failures == ""
    assert done == [[case.__name__ for case in cases.CASES]] * ranks
    assert code == 0


# The first rank, which serves no other as a meeting point, and the last; waiting for another or busy with themselves.
@pytest.mark.parametrize(("victim", "waiting"), [(0, True), (2, True), (2, False)])
def test_a_dead_rank_ends_the_others_with_a_line(victim, waiting, capfd, tmp_path):
    words = tmp_path / "words"
    code = launch(cases.lose_a_rank, 3, victim, waiting, words, timeout=cases.SHORT)
    assert code == LOST
    assert capfd.readouterr().err == f"mlakit: rank {victim} was ended by SIGKILL\n"
    lines = words.read_text().splitlines()
    for rank in {0, 1, 2} - {victim}:
        (said,) = [line for line in lines if line.startswith(f"mlakit: rank {rank}: ")]
        if waiting:
            assert re.search(
                r"another rank is gone \(.+\); ending$|rank \d has not been heard of for \d+ s; ending$", said
            )
        else:
            assert re.search(rf": rank {victim} has not been heard of for \d+ s; ending$", said)
    assert len(lines) == 2, lines


def test_what_a_rank_raises_is_not_hidden(tmp_path):
    words = tmp_path / "words"
    assert launch(cases.refuse, 2, words, timeout=cases.SHORT) == 2
    assert words.read_text() == "mlakit: error: no, got something else\n"
