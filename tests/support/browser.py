"""Which browser opens the pages of reports, if there is one."""

import functools
import os
import shutil

HOW = "need a browser: apt-get install chromium, or name one in MLAKIT_TEST_BROWSER"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@functools.cache
def find_browser() -> str | None:
    """The path of Chromium or a relative of it; None without one."""
    given = os.environ.get("MLAKIT_TEST_BROWSER")
    return shutil.which(given) if given else next(filter(None, map(shutil.which, _NAMES)), None)
