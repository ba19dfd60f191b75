"""What the results of a comparison say: summaries over seeds, paired differences, verdicts.

Everything is computed from the content of `results.json`; no conclusion is written down anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from experiments.tasks.task import Metric

Data = dict[str, Any]
Entry = dict[str, Any]
Verdict = Literal["higher", "lower", "unclear"]

_ACCURACY = Metric()

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and standard error over seeds.

    Attributes:
      values: one a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 for a single seed."""
        if len(self.values) < 2:
            return 0.0
        return float(np.std(self.values, ddof=1) / np.sqrt(len(self.values)))

    def minus(self, other: Summary) -> Summary:
        """The paired difference, seed by seed."""
        return Summary(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def times(self, factor: float) -> Summary:
        """Every value multiplied."""
        return replace(self, values=tuple(factor * value for value in self.values))

    def verdict(self) -> Verdict:
        """Whether the mean differs from zero: Student's t at 95 %, two-sided."""
        if len(self.values) < 2:
            return "unclear"
        margin = self.error * stats.t.ppf((1 + CONFIDENCE) / 2, len(self.values) - 1)
        if abs(self.mean) <= margin:
            return "unclear"
        return "higher" if self.mean > 0 else "lower"


@dataclass(frozen=True)
class Row:
    """One row of the table: a trial's numbers at its end.

    Attributes:
      pattern: such as "2:4".
      method: its name.
      lambda_w: strength of the sparse-refined term.
      metric: the task's first metric.
      metrics: all of the task's metrics, the first again among them.
      loss: on the test examples.
      sad: mask entries that differ from those of the initial weights, as a fraction.
      flip_rate: fraction of mask entries that one step changes, mean over all epochs.
      density: of the forward pass.
      ratio: time of a step over that of dense; None if it was not measured.
    """

    pattern: str
    method: str
    lambda_w: float
    metric: Summary
    metrics: tuple[tuple[Metric, Summary], ...]
    loss: Summary
    sad: Summary
    flip_rate: Summary
    density: Summary
    ratio: float | None


def rows(data: Data, part: str = "main") -> list[Row]:
    """The table of the trials of one part that came to an end, in the order they were run."""
    ratios = {(t["pattern"], t["method"]): t["ratio"] for t in data.get("step_times", ())}
    entries = [entry for entry in data["trials"] if entry["part"] == part and not entry["error"]]
    return [_row(data, entry, ratios.get((entry["pattern"], entry["method"]))) for entry in entries]


def sweep_rows(data: Data, *, decoupled: bool = False) -> list[Row]:
    """All strengths of the straight-through methods at the swept pattern, ascending.

    Args:
      data: the content of `results.json`.
      decoupled: whether the strengths are of the term after the preconditioner.
    """
    pattern = data["settings"]["patterns"][-1]
    family = ("ste", "sr_ste_decoupled") if decoupled else ("ste", "sr_ste", "sr_ste_negative")
    found = [*rows(data), *rows(data, "sweep")]
    here = [row for row in found if row.pattern == pattern and row.method in family]
    return sorted(here, key=lambda row: row.lambda_w)


def metrics_of(data: Data) -> tuple[Metric, ...]:
    """The metrics that are shown."""
    return tuple(Metric(**entry) for entry in data["settings"]["metrics"])


def metric_of(data: Data) -> Metric:
    """The metric that methods are compared by."""
    return metrics_of(data)[0]


def find_row_of(table: Sequence[Row], pattern: str, method: str) -> Row | None:
    """The row of a method at a pattern, if it is there."""
    found = [row for row in table if (row.pattern, row.method) == (pattern, method)]
    return found[0] if found else None


def curve(entry: Entry, name: str) -> np.ndarray:
    """A number of every epoch, (seeds, epochs); NaN where an epoch has none.

    Args:
      entry: of a trial.
      name: a field of the epochs; "test.x" for the test metric x.
    """
    if name.startswith("test."):
        nothing = [np.nan] * len(entry["seeds"])
        epochs = [e["test"].get(name[5:], nothing) for e in entry["epochs"]]
    else:
        epochs = [e[name] for e in entry["epochs"]]
    return np.array(epochs, float).T


def epochs_of(entry: Entry) -> np.ndarray:
    """The epochs of a trial, from 1."""
    return np.array([epoch["epoch"] for epoch in entry["epochs"]])


def weights_of(data: Data, pattern: str) -> int:
    """How many weights the masks of a pattern cover."""
    return sum(data["settings"]["weights"][pattern].values())


def total_pull(data: Data, lambda_w: float) -> float:
    """Sum over all steps of learning rate * lambda_w."""
    return float(lambda_w * data["settings"]["rate_sum"])


@dataclass(frozen=True)
class Comparison:
    """How one sentence of the paper fares at one pattern.

    Attributes:
      here: what came out.
      seen: "seen", "not clear", "not seen" or "opposite".
    """

    here: str
    seen: str


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, next to what this run shows.

    Attributes:
      says: the sentence.
      at: pattern -> comparison.
    """

    says: str
    at: dict[str, Comparison]


# (method, compared with, column, expected direction, sentence); a higher metric is a better one.
_ORDERINGS: tuple[tuple[str, str, str, Verdict, str], ...] = (
    ("sr_ste", "ste", "metric", "higher", "SR-STE is better than STE"),
    ("sr_ste", "ste", "loss", "lower", "SR-STE has a lower loss than STE"),
    ("sr_ste", "one_shot", "metric", "higher", "SR-STE is better than pruning once"),
    ("one_shot", "ste", "metric", "higher", "Pruning once is better than STE"),
    ("sr_ste_negative", "ste", "metric", "lower", "A negative lambda_w makes it worse"),
    ("ste", "dense", "sad", "higher", "A sparse forward pass (STE) raises SAD over a dense one"),
    ("ste", "dense", "flip_rate", "higher", "STE flips more of the mask in a step than dense"),
    ("sr_ste", "ste", "sad", "lower", "SR-STE lowers SAD below that of STE"),
    ("sr_ste_negative", "ste", "sad", "higher", "A negative lambda_w raises SAD"),
)


def claims(data: Data) -> list[Claim]:
    """What the paper found, next to what this run found."""
    table, metric = rows(data), metric_of(data)
    patterns = list(dict.fromkeys(row.pattern for row in table))
    closeness = {pattern: _closeness(table, pattern, metric) for pattern in patterns}
    close = f"{metric.name} within {metric.scale * metric.close:g} {metric.step}"
    found = [Claim(f"SR-STE comes close to dense ({close})", present(closeness))]
    for method, other, column, expected, says in _ORDERINGS:
        at = {p: ordering(table, p, method, other, column, expected, metric) for p in patterns}
        found.append(Claim(says, present(at)))
    return [claim for claim in found if claim.at]


def present(at: dict[str, Comparison | None]) -> dict[str, Comparison]:
    """Without the patterns at which there is nothing to compare."""
    return {pattern: comparison for pattern, comparison in at.items() if comparison is not None}


def _closeness(table: Sequence[Row], pattern: str, metric: Metric) -> Comparison | None:
    sparse, dense = (find_row_of(table, pattern, name) for name in ("sr_ste", "dense"))
    if sparse is None or dense is None:
        return None
    gap = sparse.metric.minus(dense.metric)
    seen = "seen" if abs(gap.mean) <= metric.close else "not seen"
    return Comparison(in_words("metric", gap, metric), seen)


def ordering(
    table: Sequence[Row],
    pattern: str,
    method: str,
    other: str,
    column: str,
    expected: Verdict,
    metric: Metric,
) -> Comparison | None:
    """Whether a column of one method differs from another's as expected; None if one is missing."""
    a, b = find_row_of(table, pattern, method), find_row_of(table, pattern, other)
    if a is None or b is None:
        return None
    difference = getattr(a, column).minus(getattr(b, column))
    verdict = difference.times(metric.sign if column == "metric" else 1).verdict()
    return Comparison(in_words(column, difference, metric), _seen(verdict, expected))


def _seen(verdict: Verdict, expected: Verdict) -> str:
    if verdict == "unclear":
        return "not clear"
    return "seen" if verdict == expected else "opposite"


def in_words(column: str, difference: Summary, metric: Metric = _ACCURACY) -> str:
    """A paired difference as text, rounded to where its standard error begins.

    >>> in_words("metric", Summary((0.02, 0.01, 0.018)))
    '+1.60 ± 0.31 points'
    """
    scale, unit = {
        "metric": (metric.scale, f" {metric.step}"),
        "loss": (1, ""),
        "sad": (100, " % of entries"),
        "flip_rate": (1000, " ‰ of entries"),
    }[column]
    mean, error = scale * difference.mean, scale * difference.error
    digits = 2 if error == 0 else int(np.clip(1 - np.floor(np.log10(error)), 0, 6))
    return f"{mean:+.{digits}f} ± {error:.{digits}f}{unit}"


def _row(data: Data, entry: Entry, ratio: float | None) -> Row:
    last = entry["epochs"][-1]
    metrics = tuple((m, Summary(tuple(last["test"][m.name]))) for m in metrics_of(data))
    return Row(
        pattern=entry["pattern"],
        method=entry["method"],
        lambda_w=entry["lambda_w"],
        metric=metrics[0][1],
        metrics=metrics,
        loss=Summary(tuple(last["test"]["loss"])),
        sad=Summary(tuple(curve(entry, "sad_first")[:, -1] / weights_of(data, entry["pattern"]))),
        flip_rate=Summary(tuple(curve(entry, "flip_rate").mean(axis=1))),
        density=Summary(tuple(last["density"])),
        ratio=ratio,
    )
