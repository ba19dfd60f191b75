"""The ladder as a table in Markdown: every method against one of them, at each pattern."""

from __future__ import annotations

from experiments.ladder.statistics import Compared, compare_all
from experiments.report.numbers import Row, Run


def ladder(run: Run, reference: str = "sr_ste") -> str:
    """The table of a comparison, best method first; methods at one pattern are one family.

    "time" is that of a step relative to the reference, "flips" the mean share of mask entries that
    a step changes, and "SAD" the share that differs from the first masks at the end.

    Args:
      run: the comparison, with at least two seeds.
      reference: the method that all others are compared with.

    Raises:
      ValueError: no pattern has the reference and another method, or there is a single seed.
    """
    groups = {
        pattern: {row.method: row for row in rows} for pattern, rows in run.groups("main").items()
    }
    groups = {p: rows for p, rows in groups.items() if reference in rows and len(rows) > 1}
    if not groups:
        raise ValueError(f"no pattern has both {reference!r} and a method to compare with it")
    tested = f"minus {reference}", "95% interval", "p", "p, corrected", "could see"
    columns = "pattern", "method", run.metric.title, *tested, "time", "flips ‰", "SAD %"
    header = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return header + "".join(_group(run, p, rows, reference) for p, rows in groups.items())


def _group(run: Run, pattern: str, rows: dict[str, Row], reference: str) -> str:
    values = {method: row.numbers["metric"].values for method, row in rows.items()}
    found = compare_all(values, reference)
    best_first = sorted(rows, key=lambda method: -_signed_mean(run, rows[method]))
    # Times are relative to dense in a comparison, and to SR-STE in a ladder.
    base = rows[reference].ratio or 1.0
    return "".join(
        _line(run, pattern, rows[method], found.get(method), base) for method in best_first
    )


def _line(run: Run, pattern: str, row: Row, compared: Compared | None, base: float) -> str:
    cells = [pattern, row.method, run.shown["metric"].show(row.numbers["metric"])]
    if compared is None:
        cells += [""] * 5
    else:
        scale, difference = run.metric.scale, compared.difference
        digits = run.metric.digits
        low, mean, high, effect = (
            scale * value
            for value in (difference.low, difference.mean, difference.high, difference.detectable)
        )
        # Bold where the difference is clear for the family as a whole.
        shown = f"{mean:+.{digits}f}"
        cells += [
            f"**{shown}**" if compared.is_clear else shown,
            f"{low:+.{digits}f} to {high:+.{digits}f}",
            f"{difference.p:.2g}",
            f"{compared.corrected:.2g}",
            f"{effect:.{digits}f}",
        ]
    cells.append("" if row.ratio is None else f"{row.ratio / base:.2f}")
    cells += [run.shown[name].show(row.numbers[name]) for name in ("flip_rate", "sad")]
    return f"| {' | '.join(cells)} |\n"


def _signed_mean(run: Run, row: Row) -> float:
    return run.metric.sign * row.numbers["metric"].mean
