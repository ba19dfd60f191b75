"""Small tables as aligned text, for terminals, and as HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

Row = Sequence[str]


def printable(text: str) -> str:
    r"""Escapes what would change how a line looks: control characters, and reversed text.

    Names that come from files may contain them.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text_table(header: Row, rows: Sequence[Row], *, right: Sequence[int] = ()) -> str:
    """Formats a table in aligned columns, with control characters escaped.

    Args:
      header: column titles.
      rows: rows of cells, each as long as the header.
      right: indices of columns to align to the right, for numbers.

    >>> print(text_table(["leaf", "weights"], [["kernel", "64"], ["bias", "8"]], right=[1]))
    leaf    weights
    ------  -------
    kernel       64
    bias          8
    """
    rows = [[*map(printable, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    # One format for a whole line: tables of files may have a hundred thousand lines.
    columns = "  ".join(f"{{:{'>' if i in right else '<'}{w}}}" for i, w in enumerate(widths))

    def line(cells: Row) -> str:
        return columns.format(*cells).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def html_table(header: Row, rows: Sequence[Row], *, right: Sequence[int] = ()) -> str:
    """Formats the same table as an HTML fragment, with escaped cells."""

    def line(tag: str, cells: Row) -> str:
        styled = [
            f'<{tag} style="text-align:{"right" if i in right else "left"}">'
            f"{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(styled)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"
