"""Tables as text and as HTML: every cell once, in its column, escaped."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmjax.tables import html_table, printable, text_table

CELLS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12)


@st.composite
def tables(draw, cells=CELLS):
    columns = draw(st.integers(1, 4))
    row = st.lists(cells, min_size=columns, max_size=columns)
    return draw(row), draw(st.lists(row, max_size=5)), draw(st.sets(st.integers(0, columns - 1)))


@given(tables())
def test_every_cell_stands_under_its_title(table):
    header, rows, right = table
    lines = text_table(header, rows, right=tuple(right)).split("\n")
    assert len(lines) == 2 + len(rows)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells, line in zip([header, *rows], [lines[0], *lines[2:]], strict=True):
        start = 0
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            shown = line.ljust(sum(widths) + 2 * len(widths))[start : start + width]
            assert shown == (cell.rjust(width) if i in right else cell.ljust(width))
            start += width + 2
        assert line == line.rstrip()


def test_a_table_without_rows_shows_its_titles():
    assert text_table(["leaf", "weights"], []) == "leaf  weights\n----  -------"


def test_a_row_with_a_cell_too_few():
    with pytest.raises(ValueError):
        text_table(["a", "b"], [["1"]])


class Reader(HTMLParser):
    """Collects cells by row, and fails on tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.rows, self.right = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.right.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.right[-1].append("text-align:right" in dict(attrs)["style"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert self.open[-1] in ("td", "th")
        self.rows[-1][-1] += data


@given(tables(st.text("<>&\"'/=ab ;#", max_size=12)))
def test_html_shows_the_same_cells_whatever_is_in_them(table):
    header, rows, right = table
    read = Reader(html_table(header, rows, right=tuple(right)))
    assert read.rows == [header, *rows]
    assert all([i in right for i in range(len(header))] == line for line in read.right)


def test_html_marks_the_header():
    read = html_table(["leaf"], [["kernel"]])
    assert "<thead><tr><th" in read
    assert "<tbody><tr><td" in read


@given(st.text())
def test_nothing_in_a_cell_leaves_its_line(cell):
    lines = text_table(["leaf"], [[cell], ["end"]]).split("\n")
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert cell.isprintable() == (printable(cell) == cell)
