"""Tables that grow line by line, where room is short."""

import pytest

from mlakit.bench.columns import PIPE_WIDTH
from mlakit.studies import fast_path_report, k_concat_report
from mlakit.studies.line_table import LineTable

TABLES = {
    "fast-path": fast_path_report.table,
    "k-concat": lambda width: k_concat_report.table(with_triton=True, width=width),
}


@pytest.mark.parametrize("width", [60, 80, 100, PIPE_WIDTH])
@pytest.mark.parametrize("name", TABLES)
def test_a_study_s_lines_fit_the_terminal(name, width):
    table = TABLES[name](width)
    *note, titles, rule = table.head()
    line = table.line([title for title, *_ in table.columns])
    assert line == titles  # the columns of the head, and as wide
    assert len(titles) <= width
    assert set(rule) == {"-"}
    assert len(rule) <= width
    assert bool(note) == (width < PIPE_WIDTH)


def test_the_columns_that_matter_least_go_first():
    columns = (("a", 4, 0), ("b", 4, 1), ("c", 4, 2))
    cells = ["1", "2", "3"]
    assert LineTable(columns, 18).line(cells) == "   1 |    2 |    3"
    assert LineTable(columns, 17).line(cells) == "   1 |    2"
    assert list(LineTable(columns, 10).head()) == ["(left out for want of room: b, c)", "   a", "----"]
    assert LineTable(columns, 1).line(cells) == "   1"
