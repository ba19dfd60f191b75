"""Sentences on SR-STE against STE: which one is ahead, and what explains it."""

from __future__ import annotations

from experiments.report.claims import better
from experiments.report.numbers import Run


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
