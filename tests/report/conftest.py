"""Small records as `mlakit bench` writes them, and a browser to look at pages with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlakit.bench.results import BenchmarkResult, Record, Session
from mlakit.report.load import LoadedRecord, load_records
from tests.support.browser import find_browser
from tests.support.reports import CEILINGS


@pytest.fixture
def make_record(tmp_path):
    """Saves a record of rows, and reads it as reports do."""

    def make(*rows: BenchmarkResult, name: str = "mine", device: str = "a GPU", **fields: Any) -> LoadedRecord:
        environment = {"device": {"name": device, "kind": "cuda"}, "torch": "2.11", **fields.pop("environment", {})}
        ceilings = {"bf16": {**CEILINGS, "dtype": "bfloat16"}}
        session = Session(started="2026-11-22T08:00:00+00:00", environment=environment, ceilings=ceilings)
        content = {"name": name, "planned": len(rows), "complete": True, "sessions": [session], "rows": list(rows)}
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        Record(**{**content, **fields}).save(path)
        return load_records([path])[0]

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One headless browser for all tests of a process."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=find_browser(),
            # No sandbox as it does not start for root, and nothing that a browser does of its own on a network.
            args=[
                "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", "--no-first-run",
                "--disable-background-networking", "--disable-component-update",
            ],
        )  # fmt: skip
        yield started
        started.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a page's text; at the end no script may have complained and nothing may have been asked of a network."""
    contexts, complaints = [], []

    def asked(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            complaints.append(f"asked for {request.url}")

    def open_(text: str, width: int = 1280, scheme: str = "light") -> Any:
        path: Path = tmp_path / "page.html"
        path.write_text(text)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # plotly.js alone is 5 MB to compile, on a machine that does other things too
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", asked)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
