"""Which browser opens the pages of reports, if there is one."""

import functools
import importlib.util
import os
import shutil

HOW = (
    "need a browser and playwright: apt-get install chromium, or name a relative of it in MLAKIT_TEST_BROWSER; "
    "pip install playwright"
)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@functools.cache
def find_browser() -> str | None:
    """The path of Chromium or a relative of it; None without one, or without what steers it."""
    if importlib.util.find_spec("playwright") is None:
        return None
    given = os.environ.get("MLAKIT_TEST_BROWSER")
    return shutil.which(given) if given else next(filter(None, map(shutil.which, _NAMES)), None)
