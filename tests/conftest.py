"""Which tests run where. A test that needs a GPU, Triton's interpreter or its compiler is left out elsewhere, and the
summary says so.
"""

import os

import pytest

from tests.support import browser

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = os.environ.get("MLAKIT_TEST_GPU") == "1"


def _left_out(item: pytest.Item) -> str | None:
    if item.get_closest_marker("gpu"):
        return None if ON_GPU else "need a GPU: make test-gpu"
    if ON_GPU:
        return "need no GPU: make test"
    if item.get_closest_marker("browser") and not browser.find_browser() and not INTERPRETING:
        return browser.HOW
    if bool(item.get_closest_marker("interpret")) != INTERPRETING:
        return "run in the other of make test's two passes" if not INTERPRETING else "ran in make test's first pass"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    counts: dict[str, int] = {}
    kept = []
    for item in items:
        reason = _left_out(item)
        if reason is None:
            kept.append(item)
        else:
            counts[reason] = counts.get(reason, 0) + 1
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    # xdist's controller collects nothing itself: its workers' counts are all alike, so a file from one of them is
    # enough.
    config.stash[_COUNTS] = counts
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = counts


_COUNTS = pytest.StashKey[dict[str, int]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    node.config.stash[_COUNTS] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for reason, count in config.stash.get(_COUNTS, {}).items():
        terminalreporter.write_line(f"left out: {count} tests that {reason}")
