"""Small tables as aligned text, for terminals, and as HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

Row = Sequence[str]


def text_table(header: Row, rows: Sequence[Row], *, right: Sequence[int] = ()) -> str:
    """A table in aligned columns.

    Args:
      header: column titles.
      rows: cells, as many in each row as in the header.
      right: columns aligned to the right, for numbers.

    >>> print(text_table(["leaf", "weights"], [["kernel", "64"], ["bias", "8"]], right=[1]))
    leaf    weights
    ------  -------
    kernel       64
    bias          8
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Row) -> str:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def html_table(header: Row, rows: Sequence[Row], *, right: Sequence[int] = ()) -> str:
    """The same table as an HTML fragment, every cell escaped."""

    def line(tag: str, cells: Row) -> str:
        styled = [
            f'<{tag} style="text-align:{"right" if i in right else "left"}">'
            f"{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(styled)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"
