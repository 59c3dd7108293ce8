"""Which tests run where. A test that needs a GPU, Triton's interpreter or its compiler is left out elsewhere, and the
summary says so.
"""

import os
from pathlib import Path

import pytest

from tests.support import browser

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRET = "mark.interpret"
ON_GPU = os.environ.get("MLAKIT_TEST_GPU") == "1"


def _left_out(item: pytest.Item) -> str | None:
    if item.get_closest_marker("gpu"):
        return None if ON_GPU else "need a GPU: make test-gpu"
    if ON_GPU:
        return "need no GPU: make test"
    if item.get_closest_marker("browser") and not browser.find_browser() and not INTERPRETING:
        return browser.HOW
    if bool(item.get_closest_marker("interpret")) != INTERPRETING:
        return "run in the other of make test's two passes"
    return None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Spare the interpreter's pass the files that hold no test for it.

    Importing them, their asserts rewritten and transformers with them, takes each of xdist's processes 25 CPU seconds.
    """
    test_file = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if INTERPRETING and test_file and _INTERPRET not in collection_path.read_text() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    counts: dict[str, int] = {}
    kept = []
    for item in items:
        if item.get_closest_marker("interpret") and _INTERPRET not in item.path.read_text():
            raise pytest.UsageError(f"{item.path}: the interpreter's pass looks for {_INTERPRET} in the file itself")
        reason = _left_out(item)
        if reason is None:
            kept.append(item)
        else:
            counts[reason] = counts.get(reason, 0) + 1
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    # xdist's controller collects nothing itself: its workers' counts are all alike, so a file from one of them is
    # enough.
    if INTERPRETING:
        counts = {}  # of the files that were looked at, which is not what a reader would take it for
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
