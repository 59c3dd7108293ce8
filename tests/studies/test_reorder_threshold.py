import json
from functools import partial
from itertools import pairwise

import pytest

from mlakit.bench.crossover import Point
from mlakit.bench.results import Record
from mlakit.cli.main import main
from mlakit.studies.reorder_threshold import search
from tests.studies.fake_rows import fake_device, fake_rows, timing

STUDY = ("study", "reorder-threshold", "--output-json", "r.json")


class _Row:
    """All that a point reads of a row."""

    def __init__(self, median: float | None, half: float) -> None:
        self.timing = None if median is None else timing(median, half)


def points(decode, prefill, noise=0.01):
    """`at` of a made-up curve, and the lengths that were asked for, in order."""
    asked = []

    def at(q_len):
        asked.append(q_len)
        rows = (_Row(t, noise * t if t else 0) for t in (decode(q_len), prefill(q_len)))
        return Point(q_len, *rows)

    return at, asked


@pytest.mark.parametrize("crossing", [2, 3, 5, 16, 17, 100, 147, 700, 1023])
@pytest.mark.parametrize("resolution", [0.0, 0.1, 0.5])
def test_the_crossing_is_found_in_few_points(crossing, resolution):
    # Decode costs more from the crossing on.
    at, asked = points(lambda q: 1.0 if q < crossing else 3.0, lambda q: 2.0)
    found = search(at, 1024, resolution)
    low = max(p.q_len for p in found if p.verdict == "decode")
    high = min(p.q_len for p in found if p.verdict == "prefill")
    assert low < crossing <= high
    assert high - low <= max(1, resolution * low)
    assert len(asked) == len(set(asked)) <= 17
    assert [p.q_len for p in found] == sorted(asked)


def test_a_tie_is_narrowed_from_both_sides():
    # Within 5% of one another the intervals overlap: from 95 to 105, about.
    at, _ = points(lambda q: 0.01 * q, lambda q: 1.0, noise=0.025)
    found = {p.q_len: p.verdict for p in search(at, 1024, 0.05)}
    assert "tie" in found.values()
    low = max(q for q, verdict in found.items() if verdict == "decode")
    high = min(q for q, verdict in found.items() if verdict == "prefill")
    assert 85 <= low <= 96
    assert 104 <= high <= 116


def test_a_curve_to_and_fro_gets_all_powers_of_two():
    def prefill(q):
        return 10.0 if q < 6 or 20 <= q < 200 else 0.1

    at, asked = points(lambda q: 1.0, prefill, noise=1e-6)
    found = search(at, 1024, 0.1)
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024} <= set(asked)
    changes = [(a.q_len, b.q_len) for a, b in pairwise(found) if a.verdict != b.verdict]
    assert [(low < edge <= high) for (low, high), edge in zip(changes, (6, 20, 200), strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("decode", "prefill", "longest", "asked"),
    # Nowhere to cross; one length; what cannot run at all, or not half-way, where no more can be known; decode that
    # runs out of memory has lost, wherever that is.
    [
        (lambda q: 1, lambda q: 2, 1024, [1, 4, 16, 64, 256, 1024]),
        (lambda q: 2, lambda q: 1, 100, [1, 4, 16, 64, 100]),
        (lambda q: 1, lambda q: 2, 1, [1]),
        (lambda q: None, lambda q: None, 16, [1, 4, 16]),
        (lambda q: {1: 1, 4: 1, 16: 3}.get(q), lambda q: None if q == 8 else 2, 16, [1, 4, 16, 8]),
        (lambda q: 1 if q < 12 else None, lambda q: 2, 16, [1, 4, 16, 8, 11, 13, 12]),
    ],
)
def test_what_is_asked_for(decode, prefill, longest, asked):
    at, found = points(decode, prefill, noise=1e-6)
    search(at, longest, 0.1)
    assert found == asked


# --- the whole study, with made-up times ---


def crossing_at(crossings: dict[int, float], config):
    """Decode's time grows with its tokens, and meets prefill's where the batch size says."""
    requests = config.requests()
    if config.backend == "flashmla":
        return "unavailable", "needs compute capability 9.0"
    return 1e-4 if config.pipeline == "prefill" else 1e-4 * requests[0].q_len / crossings[len(requests)]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_study(monkeypatch, capsys, tmp_path):
    measured = fake_rows(monkeypatch, partial(crossing_at, {1: 40.0, 8: 160.0}))
    assert main([*STUDY, "--backends", "mlakit", "flashmla", "--batch-sizes", "8", "1", "--tp", "8"]) == 0
    out, err = capsys.readouterr()
    assert "deepseek-v3, 16 heads, bf16, on a made-up GPU, 1024 keys, scope pipeline" in out
    assert "flashmla: not available: needs compute capability 9.0" in out
    assert "the faster pipeline changes once on 2 of 2 curves, at a q_len known to within" in out
    # Each batch size's own threshold, and one for both: between them, where the loss is the same on either side.
    record = Record.load(tmp_path / "r.json")
    assert record.complete
    assert record.mode == "decode_vs_prefill"
    assert record.planned == len(record.rows) == len(measured)
    assert record.findings[0].startswith("Recommended for mlakit: reorder_batch_threshold ")
    assert int(record.findings[0].split()[4].strip(";")) in range(64, 100)
    assert {row.config.scope for row in record.rows} == {"pipeline"}
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "saved: record r.json" in err
    # What the record holds is not measured again.
    measured.clear()
    assert main([*STUDY, "--backends", "mlakit", "--batch-sizes", "1", "8", "--tp", "8", "--resume"]) == 0
    assert measured == []


def test_lengths_of_ones_own(monkeypatch, capsys):
    measured = fake_rows(monkeypatch, partial(crossing_at, {2: 3.0}))
    assert main([*STUDY, "--batch-sizes", "2", "--q-lens", "8", "2", "--kv-len", "64", "--scope", "attention"]) == 0
    assert [config.batch_spec for config in measured] == ["2q2s64", "2q2s64", "2q8s64", "2q8s64"]
    assert "choose by --scope pipeline" in capsys.readouterr().out


def test_an_interrupt_keeps_what_there_is(monkeypatch, capsys, tmp_path):
    def outcome(config):
        if len(measured) == 5:
            raise KeyboardInterrupt
        return crossing_at({1: 40.0}, config)

    measured = fake_rows(monkeypatch, outcome)
    assert main([*STUDY, "--batch-sizes", "1"]) == 130
    assert "interrupted; what is done is in r.json. To go on: " in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["complete"] is False


def test_nothing_ran(monkeypatch, capsys):
    fake_rows(monkeypatch, lambda config: ("error", "no"))
    assert main([*STUDY, "--batch-sizes", "1"]) == 1
    assert "no row succeeded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--backends", "flash"), "--backends: flash computes no MLA"),
        (("--backends", "flashmal"), "did you mean 'flashmla'"),
        (("--batch-sizes", "0"), "expected a whole number of at least 1, got '0'"),
        (("--q-lens", "9", "--kv-len", "8"), "--q-lens: expected at most --kv-len 8, got 9"),
        (("--resolution", "-1"), "--resolution: expected a number from 0 to 10, got -1"),
        (("--tp", "3"), "--tp 3 does not divide the 16 heads of deepseek-v2-lite"),
        (("--model", "llama-3-8b"), "reorder-threshold compares MLA's two pipelines"),
        (("--output-json", "."), "is a folder"),
    ],
)
def test_mistakes(monkeypatch, capsys, flags, message):
    measured = fake_rows(monkeypatch, lambda config: 1.0)
    with pytest.raises(SystemExit) as error:
        main([*STUDY, *flags])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert measured == []


def test_on_a_cpu_for_real(monkeypatch, capsys, tmp_path):
    """Both pipelines, in a worker, checked and timed."""
    fake_device(monkeypatch, "cpu")
    flags = ("--model", "tiny", "--batch-sizes", "2", "--kv-len", "16", "--q-lens", "1", "8")
    assert main([*STUDY, *flags, "--repeats", "2", "--quiet"]) == 0
    rows = Record.load(tmp_path / "r.json").rows
    assert [(row.config.batch_spec, row.modes) for row in rows] == [
        ("2q1s16", {"decode": "mqa"}), ("2q1s16", {"prefill": "mha"}),
        ("2q8s16", {"decode": "mqa"}), ("2q8s16", {"prefill": "mha"}),
    ]  # fmt: skip
    assert all(row.success and row.check for row in rows)
    out, err = capsys.readouterr()
    assert "Recommended for sdpa" in out
    assert err == ""
