"""The page, opened and used in a headless browser. `open_page` fails a test whose page complains or asks a network."""

import json

import pytest

from mlakit.bench.results import GpuState
from mlakit.bench.units import seconds
from mlakit.report.html import render_html
from mlakit.report.load import load_record, load_records
from tests.support.reports import PARALLEL, RESULTS, bench_row

pytestmark = pytest.mark.browser

# Whether a visible thing but the scrolling boxes and figures reaches beyond the right edge.
_TOO_WIDE = """() => [...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, svg') &&
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((e) => e.id || e.className)"""


def fastest(page):
    """What the page says first: batch -> (backend, time)."""
    rows = page.eval_on_selector_all(
        "#fastest tbody tr",
        "rows => rows.map(row => [...row.cells].slice(0, 3).map(cell => cell.innerText.split('\\n')[0].trim()))",
    )
    return {batch: tuple(found) for batch, *found in rows}


def column(page, title):
    """Texts of a column of the table of all rows."""
    titles = [text.strip() for text in page.locator("#rows thead th").all_inner_texts()]
    return page.eval_on_selector_all(
        f"#rows tbody td:nth-child({titles.index(title) + 1})", "c => c.map(x => x.innerText)"
    )


@pytest.fixture(scope="module")
def h200():
    """The page of all committed records."""
    return render_html(load_records([*sorted(RESULTS.glob("*.json")), PARALLEL]), title="H200")


def test_the_committed_records_in_use(h200, open_page):
    rows = [row for row in json.loads((RESULTS / "dense_decode.json").read_text())["rows"] if row["op"] == "mla_decode"]
    source = [row for row in rows if row["row"] == "64x128x4096"]
    source.sort(key=lambda row: row["median_s"])
    page = open_page(h200)
    assert page.title() == "H200"
    assert page.locator("#warnings summary").count() == 1

    # The question that most come with: which backend is the fastest at this batch?
    page.select_option("#operation", "mla_decode")
    page.fill("#search", "64x128")
    assert list(fastest(page)) == ["64x128x4096", "64x128x4096 q4", "e4m3 64x128x4096"]
    page.locator("#fastest tbody tr").first.click()
    (found,) = fastest(page).values()
    assert found[0] == source[0]["impl"]
    assert found[1] == seconds(source[0]["median_s"])
    # One batch alone: a line for each backend in the figure, the fastest first.
    assert page.locator("#compare .ytick text").all_text_contents() == [row["impl"] for row in source]

    # Against a baseline of one's own choice.
    page.select_option("#baseline", "flash_mla")
    peer = next(row["median_s"] for row in source if row["impl"] == "flash_mla")
    shown = dict(zip(column(page, "backend"), column(page, "speed-up"), strict=True))
    assert shown.pop("flash_mla") == "baseline"
    for row in source:
        if row["impl"] != "flash_mla":
            assert float(shown[row["impl"]].rstrip("×")) == pytest.approx(peer / row["median_s"], rel=0.005)

    # A backend that is taken away is no longer the fastest.
    page.get_by_role("button", name=source[0]["impl"], exact=True).click()
    assert next(iter(fastest(page).values()))[0] == source[1]["impl"]
    page.get_by_role("button", name="show all", exact=True).click()

    page.fill("#search", "")
    assert page.locator("#fastest tbody tr").count() == 12
    page.click("#more")
    assert page.locator("#fastest tbody tr").count() == len({row["row"] for row in rows})
    # Sorting, both ways; what has no value would come last.
    page.click("#more-rows")
    page.click("#rows th button:text-is('time')")
    up = column(page, "time")
    page.click("#rows th button:text-is('time')")
    assert page.locator("#rows th[aria-sort=descending]").inner_text().startswith("time")
    down = column(page, "time")
    assert up == [seconds(row["median_s"]) for row in sorted(rows, key=lambda row: row["median_s"])]
    assert (up[0], up[-1], len(up)) == (down[-1], down[0], len(down))

    for metric in page.locator("#metric button").all_inner_texts():
        page.get_by_role("button", name=metric, exact=True).click()
        assert page.locator("#compare .scatterlayer .points path").count() > 25, metric
    assert page.locator("#roofline .scatterlayer .lines path").count() == 1
    assert page.locator("#sweep .scatterlayer .lines path").count() > 2
    page.select_option("#sweep-x", "heads")
    assert page.locator("#sweep .xtitle").text_content().startswith("heads")
    assert page.locator("#map .heatmaplayer image").count() == 1
    page.select_option("#map-what", "fa3")
    assert "blue is faster" in page.inner_text("#map-hint")

    # What was predicted, on more ranks than there were, is shown and competes with nobody.
    page.select_option("#operation", "attention over ranks")
    assert "predicted, not measured" in column(page, "notes")
    assert not any("predicted" in winner for winner, _ in fastest(page).values())


def test_at_phone_width_in_the_dark(h200, open_page):
    page = open_page(h200, width=390, scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(20, 24, 29)"
    # Long titles, many backends, many sizes, and all at once.
    for operation in ("mla_decode", "layer", "concat_k", ""):
        page.select_option("#operation", operation)
        assert page.evaluate(_TOO_WIDE) == [], operation
        assert fastest(page), operation
    page.click("#theme")
    assert page.evaluate(background) == "rgb(255, 255, 255)"


HOSTILE = "<script>window.hacked=1</script>"
IMAGE = "<img src=x onerror=window.hacked=1>"


def test_labels_of_records_stay_text(make_record, open_page):
    rows = [
        bench_row(HOSTILE),
        bench_row(IMAGE, median=2e-3, label=f"{IMAGE}</script>"),
        bench_row("a<b>&amp;\"'", spec="q64"),
        bench_row("slow", median=None, error=HOSTILE, status="error"),
        bench_row("'; alert(1); '", spec="4q1s1k", gpu=GpuState(throttle_reasons=[IMAGE])),
    ]
    record = make_record(*rows, name=f"{HOSTILE}{IMAGE}", device=IMAGE, environment={"torch": HOSTILE})
    text = render_html([record, make_record(rows[0], name="</script><b>", device=HOSTILE)], title=f"</title>{HOSTILE}")
    page = open_page(text)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, body b, body script:not([type])").count() == 2  # the page's own two scripts
    assert HOSTILE in column(page, "backend")
    assert f"{IMAGE}</script>" in column(page, "backend")
    assert HOSTILE in page.inner_text("#rows")  # the reason of the row that failed
    legend = page.locator("#compare .legendtext").all_text_contents()
    assert HOSTILE in legend
    assert "a<b>&amp;\"'" in legend
    page.evaluate("Plotly.Fx.hover('compare', [{curveNumber: 0, pointNumber: 0}])")
    assert HOSTILE in page.locator("#compare .hoverlayer").text_content()
    assert page.locator("img, body b, body script:not([type])").count() == 2
    page.fill("#search", "<b>")
    assert "None of" in page.inner_text("#fastest-hint")
    assert page.evaluate("window.hacked") is None


def test_thresholds_failures_and_ties(make_record, open_page):
    rows = [
        bench_row(spec=f"{n}q{q}s{k}", median=base * (q if pipeline == "decode" else 6), pipeline=pipeline,
                  label=f"sdpa_{pipeline}")
        for n in (1, 4) for q in (2, 8, 32) for k, base in (("1k", 1e-5), ("4k", 3e-5))
        for pipeline in ("decode", "prefill")
    ]  # fmt: skip
    crossed = make_record(*rows, name="crossed", mode="decode_vs_prefill")
    tied = [bench_row("one", "9q1s1k", 1e-3), bench_row("two", "9q1s1k", 1.005e-3), bench_row("none", "9q1s1k", None)]
    page = open_page(render_html([crossed, make_record(*tied, bench_row("none", "q9", None), name="tied")]))
    assert page.locator("#threshold .heatmaplayer image").count() == 1
    assert "decode is faster up to q_len 2" in page.inner_text("#finding-section ul")
    # A map of two of three sizes, for each value of the third.
    assert page.locator("#map .heatmaplayer image").count() == 1
    page.select_option("#map-x", "batch")
    page.select_option("#record", "tied")
    assert fastest(page)["9q1s1k"] == ("one", "1.00 ms")
    assert "within its interval: two" in page.inner_text("#fastest")
    assert "none has a time" in page.inner_text("#fastest")
    page.get_by_role("button", name="two", exact=True).click()
    assert "the only one with a time" in page.inner_text("#fastest")
    assert "no answer" in column(page, "notes")
    assert page.inner_text("#rows-hint").startswith("3 rows, 2 without a time;")


def test_a_fresh_run_on_this_machine(tmp_path, monkeypatch, open_page):
    from mlakit.cli.main import main

    monkeypatch.chdir(tmp_path)
    few = ["--batch-sizes", "1", "2", "--num-iters", "2", "--num-warmup", "1", "--device", "cpu"]
    assert main(["study", "k-concat", *few, "--output-json", "run.json"]) == 0
    assert main(["report", "run.json", "-o", "out/report.html", "--baseline", "cat"]) == 0
    page = open_page((tmp_path / "out" / "report.html").read_text())
    times = {(row.job, row.backend): row.seconds for row in load_record(tmp_path / "run.json").rows}
    jobs = dict.fromkeys(job for job, _ in times)
    winners = {job: min(("cat", "direct_copy"), key=lambda name: times[job, name] or 0.0) for job in jobs}
    assert {job: winner for job, (winner, _) in fastest(page).items()} == winners
    assert page.input_value("#baseline") == "cat"
    assert page.locator("#compare .scatterlayer .points path").count() == len(times)
