"""Documents that are filled from records, as their authors meet it: markers, what is wrong with them, and plots."""

import json
import re

import pytest
from PIL import Image

from mlakit.report.documents import update_documents
from mlakit.report.style import COLOURS

ASKED = "<!-- mlakit report\nrecord: speed.json\n"
END = "-->\n<!-- mlakit end -->\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with a record of two backends at two jobs."""
    write_record(tmp_path, 1e-5)
    return tmp_path


def write_record(folder, ours: float) -> None:
    rows = [
        {
            "op": "mla_decode",
            "row": job,
            "impl": impl,
            "median_s": s,
            "ci95_s": [s, s],
            "tb_per_s": 2e-5 / s,
            "heads": 16,
        }
        for job in ("8x16", "32x16")
        for impl, s in (("hopper", ours), ("fa3", 2e-5))
    ]
    ceilings = {"dtype": "bfloat16", "copy_bytes_per_s": 4e12, "read_bytes_per_s": 4e12, "flops_per_s": 8e14}
    environment = {"device": {"name": "a GPU"}, "torch": "2.13", "triton": "3.7"}
    content = {"schema": "mlakit.speed/1", "operation": "decode", "started": "2026-11-22", "environment": environment}
    (folder / "speed.json").write_text(json.dumps({**content, "ceilings": ceilings, "peers": {}, "rows": rows}))


def test_a_marker_is_filled_and_the_rest_left_alone(folder):
    document = folder / "README.md"
    document.write_text(
        f"# Mine\n\nbefore\n\n{ASKED}columns: {{us: hopper, them: fa3}}\nbaseline: them\n{END}\nafter\n"
    )
    assert update_documents([document]) == [document]
    text = document.read_text()
    assert re.sub(r"(-->\n).*(<!-- mlakit end)", r"\1\2", text, flags=re.DOTALL) == (
        f"# Mine\n\nbefore\n\n{ASKED}columns: {{us: hopper, them: fa3}}\nbaseline: them\n{END}\nafter\n"
    )
    assert "-->\n\n| µs | us | them | times the speed |\n" in text  # without an empty line some take it for no table
    assert "| 8x16 | **10.0** | 20.0 | 2.00 |" in text
    assert update_documents([document]) == []  # it is current
    write_record(folder, 1.5e-5)
    assert update_documents([document], check=True) == [document]
    assert document.read_text() == text  # check changes nothing
    assert update_documents([document]) == [document]
    assert "| 8x16 | **15.0** |" in document.read_text()


def test_records_are_found_from_the_document(folder, monkeypatch):
    (folder / "docs").mkdir()
    document = folder / "docs" / "page.md"
    document.write_text(f"{ASKED.replace('speed', '../speed')}{END}")
    monkeypatch.chdir("/")
    assert update_documents([document]) == [document]


def test_a_marker_in_a_block_of_code_is_an_example(folder):
    document = folder / "page.md"
    example = f"```markdown\n{ASKED}{END}```\n"
    document.write_text(f"{example}\n{ASKED}{END}\n{example}")
    update_documents([document])
    assert document.read_text().startswith(example)
    assert document.read_text().endswith(example)
    assert document.read_text().count("| 8x16 |") == 1


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("record: nowhere.json\n", "line 3: .*nowhere.json: No such file"),
        (
            "record: speed.json\ncolumn: {a: hopper}\n",
            "line 3: column: Extra inputs .* keys are record, operation, col",
        ),
        ("record: speed.json\nvalue: speed\n", "line 3: value: Input should be 'time', .* got 'speed'"),
        ("operation: mla_decode\n", "line 3: record: Field required"),
        ("record: speed.json\noperation: decod\n", "line 3: no operation 'decod'; there are: mla_decode"),
        ("record: [speed.json\n", "line 3: the marker is no YAML"),
        ("speed.json\n", "line 3: the marker must hold keys and values, .* got 'speed.json'"),
        ("record: speed.json\ncolumns: {a: hoper}\n", "line 3: no backend 'hoper'; there are: fa3, hopper"),
    ],
)
def test_what_is_wrong_with_a_marker_is_said_with_its_line(folder, marker, message):
    document, other = folder / "page.md", folder / "other.md"
    document.write_text(f"one\n\n<!-- mlakit report\n{marker}{END}")
    other.write_text(before := f"{ASKED}{END}")
    with pytest.raises(ValueError, match=f"page.md, {message}"):
        update_documents([other, document])
    assert other.read_text() == before  # nothing was written


def test_an_unfinished_marker_takes_nothing_else_with_it(folder):
    document = folder / "page.md"
    document.write_text(before := f"{ASKED}-->\nwords\n\n{ASKED}{END}")
    with pytest.raises(ValueError, match=r"page.md, line 1: a marker without `<!-- mlakit end -->` after it"):
        update_documents([document])
    assert document.read_text() == before
    document.write_text(f"{ASKED}-->\n")
    with pytest.raises(ValueError, match=r"page.md, line 1: a marker without"):
        update_documents([document])


def test_documents_without_markers(folder):
    (folder / "page.md").write_text("words\n")
    with pytest.raises(ValueError, match=r"no `<!-- mlakit report` marker in .*page.md"):
        update_documents([folder / "page.md"])
    with pytest.raises(ValueError, match=r"gone.md: No such file"):
        update_documents([folder / "gone.md"])


def test_a_plot_is_drawn_when_it_would_show_something_else(folder):
    document, image = folder / "page.md", folder / "images" / "limits.png"
    document.write_text(f"{ASKED}plot: images/limits.png\ntitle: Decode\ncolumns: {{us: hopper, them: fa3}}\n{END}")
    assert update_documents([document], check=True) == [document, image]
    assert not image.exists()
    assert update_documents([document]) == [document, image]
    assert "\n![Decode](images/limits.png)\n" in document.read_text()
    with Image.open(image) as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20)}
    for colour in COLOURS[:2]:  # both backends are in it
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in colours
    assert update_documents([document]) == []
    write_record(folder, 1.5e-5)
    assert update_documents([document]) == [image]
    image.write_bytes(b"no image")
    assert update_documents([document]) == [image]
