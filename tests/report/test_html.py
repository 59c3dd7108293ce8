"""The page as a file: complete in itself, and nothing of a record's is markup."""

import base64
import builtins
import hashlib
import re

import pytest

from mlakit.report.html import MissingPackageError, render_html
from tests.support.reports import bench_row, data_of


def test_the_page_is_complete_in_itself(make_record):
    record = make_record(bench_row(), bench_row("flashmla", median=5e-4))
    text = render_html([record])
    head, _, rest = text.partition('<script type="application/json" id="data">')
    markup = head + re.sub(r"<script>.*?</script>", "<script></script>", rest, flags=re.DOTALL)
    assert re.findall(r"(?:src|href(?!=\"#)|action)\s*=|url\(|@import|https?:", markup) == []
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    assert "plotly.js v" in scripts[0][:200]
    # The page's policy lets these two scripts run, and no other.
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert f"script-src 'sha256-{digests[0]}' 'sha256-{digests[1]}';" in text
    assert "default-src 'none'" in text
    found = data_of(text)
    assert [row["time"] for row in found["rows"]] == [1e-3, 5e-4]
    assert found["baseline"] is None
    assert text == render_html([record])  # the same records, the same page


def test_what_records_hold_is_text(make_record):
    hostile = "</script><script>alert(1)</script><!--"
    record = make_record(
        bench_row(hostile), bench_row("x", median=None, error=hostile), name=hostile, device=hostile,
        environment={"torch": hostile}, complete=False,
    )  # fmt: skip
    text = render_html([record], title=hostile)
    assert "alert(1)</script>" not in text
    assert "&lt;script&gt;alert(1)" in text  # in title, head line, warnings and environment
    assert data_of(text)["rows"][0]["backend"] == hostile


def test_title_warnings_and_environment(make_record):
    quiet = render_html([make_record(bench_row())])
    assert "<title>mlakit: mine</title>" in quiet
    assert 'id="warnings"' not in quiet
    pair = [make_record(bench_row()), make_record(bench_row(), name="other", environment={"torch": "2.13"})]
    text = render_html(pair, title="Both")
    assert "<title>Both</title>" in text
    assert "1 warning\n" in text or "1 warning<" in text
    assert re.search(r'<tr class="differs"><th scope="row">torch</th><td>2\.11</td><td>2\.13</td></tr>', text)
    assert "torch differs" in text  # at the top, too
    assert "torch 2.11" in quiet
    assert re.search(r'<tr><th scope="row">device</th>', text)


def test_a_package_that_is_not_there(make_record, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("plotly"):
            raise ModuleNotFoundError("No module named 'plotly'", name="plotly")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"needs plotly, .* pip install 'mlakit\[report\]'"):
        render_html([make_record(bench_row())])
