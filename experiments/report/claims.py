"""What the papers claim, and whether a run shows it: one table, and one test for every row.

To add a claim, add a row to `CLAIMS`. No verdict is hard-coded: all follow from the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from scipy import stats

from experiments.report.numbers import Row, Run, Summary

Verdict = Literal["higher", "lower", "unclear"]
Seen = Literal["seen", "opposite", "not clear"]

CONFIDENCE = 0.95

ZHOU = "Zhou et al. 2021"  # The paper on SR-STE, at ICLR; its networks are trained on ImageNet.
XIANG = "Xiang et al. 2023"  # The paper on SUBP, at NeurIPS; also on ImageNet.
OURS = ""  # Comparisons that no paper makes.


class Claim(NamedTuple):
    """A statement about how one method compares with another at one pattern."""

    source: str
    says: str
    method: str
    other: str
    number: str  # A key of `Row.numbers`; a "higher" metric is a better one.
    expected: Literal["higher", "lower"]
    close: bool = False  # Whether falling short by less than the metric's `close` is "higher" too.


# fmt: off
CLAIMS = (
    Claim(ZHOU, "SR-STE comes close to dense", "sr_ste", "dense", "metric", "higher", close=True),
    Claim(ZHOU, "SR-STE is better than STE", "sr_ste", "ste", "metric", "higher"),
    Claim(ZHOU, "SR-STE has a lower loss than STE", "sr_ste", "ste", "loss", "lower"),
    Claim(ZHOU, "SR-STE is better than pruning once", "sr_ste", "one_shot", "metric", "higher"),
    Claim(ZHOU, "Pruning once is better than STE", "one_shot", "ste", "metric", "higher"),
    Claim(ZHOU, "A negative λ hurts", "sr_ste_negative", "ste", "metric", "lower"),
    Claim(ZHOU, "STE raises SAD above that of dense training", "ste", "dense", "sad", "higher"),
    Claim(ZHOU, "STE changes the mask more often than dense training",
          "ste", "dense", "flip_rate", "higher"),
    Claim(ZHOU, "SR-STE lowers SAD below that of STE", "sr_ste", "ste", "sad", "lower"),
    Claim(ZHOU, "A negative λ raises SAD", "sr_ste_negative", "ste", "sad", "higher"),
    Claim(XIANG, "SUBP is better than one-shot 1xN", "subp", "one_by_n", "metric", "higher"),
    Claim(XIANG, "SUBP has a lower loss than one-shot 1xN",
          "subp", "one_by_n", "loss", "lower"),
    Claim(XIANG, "SUBP with the L1 norm alone has a lower loss than one-shot 1xN",
          "subp_l1", "one_by_n", "loss", "lower"),
    Claim(XIANG, "Ranking by angle and norm is better than by norm",
          "subp", "subp_l1", "metric", "higher"),
    Claim(XIANG, "Ranking by angle and norm has a lower loss than by norm",
          "subp", "subp_l1", "loss", "lower"),
    Claim(XIANG, "SUBP spreads blocks over the rows more evenly than one-shot 1xN",
          "subp", "one_by_n", "balance", "higher"),
    Claim(OURS, "STE is worse than dense", "ste", "dense", "metric", "lower"),
    Claim(OURS, "STE comes close to dense", "ste", "dense", "metric", "higher", close=True),
    Claim(OURS, "SR-STE has a higher training loss than dense: it fits the data less well",
          "sr_ste", "dense", "train_loss", "higher"),
    Claim(OURS, "SR-STE is better with the pull after the preconditioner",
          "sr_ste_decoupled", "sr_ste", "metric", "higher"),
    Claim(OURS, "SUBP is worse than SR-STE at the same density",
          "subp", "sr_ste", "metric", "lower"),
)
# fmt: on


class Comparison(NamedTuple):
    """A claim's verdict at one pattern: the difference as text, and whether it is as claimed."""

    here: str
    seen: Seen


class Finding(NamedTuple):
    """A claim in words, and its verdict at each pattern; None where a method is missing."""

    says: str
    source: str
    at: list[Comparison | None]


def judge(run: Run, patterns: Iterable[str]) -> list[Finding]:
    """The claims that can be tested at one of the patterns or more."""
    # What is close depends on the task, so it is part of the claim that readers see.
    size = f"{run.metric.scale * run.metric.close:.3g}"
    margin = f"{size} {run.metric.step.removesuffix('s') if size == '1' else run.metric.step}"
    found = []
    for claim in CLAIMS:
        at = [_compare(run, claim, pattern) for pattern in patterns]
        if any(at):
            says = f"{claim.says} (within {margin})" if claim.close else claim.says
            found.append(Finding(says, claim.source, at))
    return found


def verdict(difference: Summary, margin: float = 0.0) -> Verdict:
    """Whether the mean of paired differences is above or below `-margin`.

    Student's t-test, two-sided, at 95%. One seed alone is never clear.
    """
    if len(difference.values) < 2:
        return "unclear"
    # Zero where all seeds differ by exactly the same; then any difference is clear.
    reach = difference.error * stats.t.ppf((1 + CONFIDENCE) / 2, len(difference.values) - 1)
    if abs(difference.mean + margin) <= reach:
        return "unclear"
    return "higher" if difference.mean > -margin else "lower"


def better(run: Run, method: Row, other: Row, margin: float = 0.0) -> Verdict:
    """Whether a method's metric is better ("higher") than another's, also where lower is better."""
    difference = method.numbers["metric"].minus(other.numbers["metric"])
    # Now higher is better, also for errors.
    signed = Summary(tuple(run.metric.sign * value for value in difference.values))
    return verdict(signed, margin)


def _compare(run: Run, claim: Claim, pattern: str) -> Comparison | None:
    method, other = run.find(pattern, claim.method), run.find(pattern, claim.other)
    # N:M rows next to blocks belong to their own pattern and are judged there.
    if method is None or other is None or method.pattern != pattern:
        return None
    # Close means not worse by more than the margin: being better also counts.
    if claim.number == "metric":
        found = better(run, method, other, run.metric.close if claim.close else 0.0)
    else:
        found = verdict(method.numbers[claim.number].minus(other.numbers[claim.number]))
    seen: dict[Verdict, Seen] = {"unclear": "not clear", claim.expected: "seen"}
    here = run.gap(method, other, claim.number)
    if other.pattern != pattern and other.method != "dense":
        here += f" (at {other.pattern})"
    return Comparison(here, seen.get(found, "opposite"))
