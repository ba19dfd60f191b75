"""Sentences on SR-STE against STE: which one is ahead, and what explains it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from experiments.report.claims import better
from experiments.report.numbers import Row, Run
from experiments.report.pictures import name_of


def opening(run: Run) -> list[str]:
    """What a reader wants to know first: three sentences, fewer if trials are missing."""
    density = run.settings["density"]
    patterns = sorted(run.groups("main"), key=lambda pattern: density[pattern])
    found = [_cost(run, pattern) for pattern in patterns[:1]]
    found += [f"At {p}, {headline(run, p)}" for p in patterns[:1] if headline(run, p)]
    blocks = sorted(run.groups("blocks"), key=lambda pattern: density[pattern])
    found += [_blocks(run, pattern) for pattern in blocks[:1]]
    # Without blocks, the easiest pattern is the other end of the range.
    found += [_cost(run, pattern) for pattern in patterns[:0:-1]]
    return [sentence for sentence in found if sentence][:3]


def _cost(run: Run, pattern: str) -> str:
    """What the best sparse method reaches at a pattern, and what dense training does."""
    dense = run.find(pattern, "dense")
    sparse = [row for row in run.groups("main")[pattern] if row.method != "dense"]
    best = run.best([row for row in sparse if row.method != "sr_ste_negative"])
    if dense is None or best is None:
        return ""
    kept = f"{100 * run.settings['density'][pattern]:.3g}% of the weights ({pattern})"
    return (
        f"With {kept}, {name_of(best.method)} is the best method and reaches {_level(run, best)}; "
        f"dense training reaches {_level(run, dense)}."
    )


def _blocks(run: Run, pattern: str) -> str:
    """What SUBP reaches with blocks, and what SR-STE does at the same density without."""
    subp, dense = run.find(pattern, "subp"), run.find(pattern, "dense")
    if subp is None or dense is None:
        return ""
    refined = run.find(pattern, "sr_ste")
    beside = f" and SR-STE at the same density {_level(run, refined)}" if refined else ""
    return f"With blocks ({pattern}), SUBP reaches {_level(run, subp)}{beside}."


def _level(run: Run, row: Row) -> str:
    """The metric of a row as text, such as "96.33 ± 0.14% accuracy"."""
    metric = run.metric
    space = "" if metric.unit in ("", "%") else " "
    return f"{run.shown['metric'].show(row.numbers['metric'])}{space}{metric.unit} {metric.name}"


def plain_rules(rules: Iterable[str]) -> list[str]:
    """Rules for the paths of layers as names: "^stem/" becomes "stem".

    >>> plain_rules(("^stem/", "/flow1/", r"(query|key)/kernel$"))
    ['stem', 'flow1', 'query or key/kernel']
    """
    bare = [re.sub(r"[\\^$()]", "", rule).strip("/") for rule in rules]
    return [rule.replace("|", " or ").replace(".*", "…") for rule in bare]


def headline(run: Run, pattern: str) -> str:
    """Which of SR-STE and STE is ahead at a pattern; empty where one is missing."""
    ste, refined = run.find(pattern, "ste"), run.find(pattern, "sr_ste")
    if ste is None or refined is None:
        return ""
    words = {"higher": "ahead of", "lower": "behind", "unclear": "not clearly different from"}
    ahead = words[better(run, refined, ste)]
    return f"SR-STE is {ahead} STE: {run.gap(refined, ste)}, paired by seed."


def reasons(run: Run, pattern: str) -> list[str]:
    """Sentences that explain the headline at a pattern, if the run measured the numbers."""
    dense, ste, refined = (run.find(pattern, name) for name in ("dense", "ste", "sr_ste"))
    if dense is None or ste is None or refined is None:
        return []
    gap = f"The difference between STE and dense is {run.gap(ste, dense)}."
    if better(run, ste, dense) == "lower" and better(run, refined, ste) == "higher":
        # The tests have settled the signs.
        lost, won = (
            abs(row.numbers["metric"].minus(ste.numbers["metric"]).mean) for row in (dense, refined)
        )
        metric = run.metric
        won_back = f"{metric.scale * won:.{metric.digits}f} {metric.step}"
        gap += f" SR-STE wins back {won_back} of it, {100 * won / lost:.0f}%."
    # One exchange changes two mask entries.
    kept = ste.numbers["density"].mean
    shares = [50 * row.numbers["flip_rate"].mean / kept for row in (dense, ste, refined)]
    times = f" ({shares[1] / shares[0]:.1f} times as many)" if shares[0] > 0 else ""
    churn = (
        f"One step exchanges {shares[0]:.2g}% of the kept weights with dense training, "
        f"{shares[1]:.2g}% with STE{times} and {shares[2]:.2g}% with SR-STE."
    )
    return [churn, gap]
