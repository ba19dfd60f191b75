"""The numbers of a comparison, read from `results.json`: one row for each trial that ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks.task import Metric

Data = dict[str, Any]


class Summary(NamedTuple):
    """One number of every seed."""

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
        # A seed gives every method the same initial weights and order of the data, so that pairing
        # cancels most of what seeds differ in.
        return Summary(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


class Number(NamedTuple):
    """How one number of a row is shown.

    Attributes:
      title: of its column.
      scale: what it is multiplied by before it is shown.
      form: format of the scaled number.
      unit: of differences.
      has_error: whether tables show its standard error.
    """

    title: str
    scale: float
    form: str
    unit: str = ""
    has_error: bool = True

    def show(self, summary: Summary) -> str:
        """The mean as text, with its standard error if there are several seeds."""
        mean, error = self.scale * summary.mean, self.scale * summary.error
        if not self.has_error or len(summary.values) < 2:
            return format(mean, self.form)
        return f"{mean:{self.form}} ± {error:{self.form}}"

    def show_difference(self, difference: Summary) -> str:
        """A paired difference as text, rounded to where its standard error begins.

        >>> Number("accuracy %", 100, ".2f", " points").show_difference(Summary((0.01, 0.03)))
        '+2.0 ± 1.0 points'
        """
        mean, error = self.scale * difference.mean, self.scale * difference.error
        # Two digits of the error; the results keep no more than six.
        digits = 2 if error == 0 else int(np.clip(1 - np.floor(np.log10(error)), 0, 6))
        return f"{mean:+.{digits}f} ± {error:.{digits}f}{self.unit}"


@dataclass(frozen=True)
class Row:
    """A trial and its numbers at the end of training.

    Attributes:
      part: "main", "sweep", "shapes", "blocks" or "beside"; see `experiments.training.results`.
      pattern: such as "2:4".
      method: a row of `experiments.training.methods.METHODS`.
      lambda_w: strength of the pull on pruned weights; 0 where the method has none.
      epochs: what was measured in each epoch.
      numbers: name -> summary. "metric" is the first metric of the task, and "sad" the fraction of
        mask entries that differ from the initial weights' masks; "flip_rate" and "regrown" are
        means over the epochs. "balance" and "regrown" exist only for remembered masks of blocks.
      kept: layer -> blocks kept in each row at the end, (seeds, rows); empty where "balance" is
        missing.
      ratio: time of a step over that of dense; None if it was not measured.
    """

    part: str
    pattern: str
    method: str
    lambda_w: float
    epochs: list[Data]
    numbers: dict[str, Summary]
    kept: dict[str, np.ndarray]
    ratio: float | None

    def curve(self, name: str) -> np.ndarray:
        """One number over time, (seeds, epochs); "test.x" is NaN in epochs without evaluation."""
        return _curve(self.epochs, name)


class Run:
    """A comparison, finished or not.

    Attributes:
      data: the content of `results.json`.
      settings: what was trained, and how.
      metric: what methods are compared by: the first of `metrics`.
      metrics: the metrics that are shown.
      shown: name -> how it is shown.
      rows: one for each trial that ended, in the order of training.
    """

    def __init__(self, data: Data) -> None:
        """Reads `data`."""
        self.data, self.settings = data, data["settings"]
        self.metrics = [Metric(**entry) for entry in self.settings["metrics"]]
        self.metric, *others = self.metrics
        m = self.metric
        self.shown = {
            "metric": Number(m.title, m.scale, f".{m.digits}f", f" {m.step}"),
            **{m.name: Number(m.title, m.scale, f".{m.digits}f", "", False) for m in others},
            "loss": Number("loss", 1, ".3f"),
            "train_loss": Number("training loss", 1, ".3f"),
            "sad": Number("SAD %", 100, ".1f", " % of entries"),
            "flip_rate": Number("flips ‰", 1000, ".2f", " ‰ of entries"),
            "density": Number("kept %", 100, ".3g", "", False),
            "balance": Number("balance %", 100, ".0f", " points", False),
            "regrown": Number("regrown", 1, ".1f", "", False),
        }
        self.rows = [self._row(entry) for entry in data["trials"] if not entry["error"]]

    def part(self, *names: str) -> list[Row]:
        """The rows of some parts, one part after the other."""
        return [row for name in names for row in self.rows if row.part == name]

    def patterns(self, part: str) -> list[str]:
        """The patterns that were trained in a part."""
        return list(dict.fromkeys(row.pattern for row in self.part(part)))

    def find(self, pattern: str, method: str) -> Row | None:
        """The row of a method in a pattern's table, including the N:M rows next to blocks."""
        # Not the part "sweep": it has rows of the same pattern and method with other strengths.
        here = [row for row in self.part("main", "blocks") if row.pattern == pattern]
        found = [row for row in [*here, *self.beside(pattern)] if row.method == method]
        return found[0] if here and found else None

    def beside(self, pattern: str) -> list[Row]:
        """What a pattern of blocks is compared with: dense, and SR-STE at the same density."""
        if pattern not in self.settings["block_patterns"]:
            return []
        density, trained = self.settings["density"], self.part("main", "beside")
        # Dense training is the same at every pattern, so one row stands for all.
        return [row for row in trained if row.method == "dense"][:1] + [
            row
            for row in trained
            if row.method == "sr_ste" and np.isclose(density[row.pattern], density[pattern])
        ]

    def sweep(self, *, decoupled: bool = False) -> list[Row]:
        """STE and all strengths of SR-STE at the swept pattern, ascending.

        Args:
          decoupled: take the strengths of the pull after the preconditioner instead.
        """
        # Only the last pattern is swept.
        pattern = self.settings["patterns"][-1]
        family = ("ste", "sr_ste_decoupled") if decoupled else ("ste", "sr_ste", "sr_ste_negative")
        rows = [row for row in self.part("main", "sweep") if row.pattern == pattern]
        return sorted((r for r in rows if r.method in family), key=lambda row: row.lambda_w)

    def best(self, rows: list[Row]) -> Row:
        """The row with the best mean of the metric."""
        return max(rows, key=lambda row: self.metric.sign * row.numbers["metric"].mean)

    def gap(self, method: Row, other: Row, name: str = "metric") -> str:
        """The paired difference of two rows as text."""
        return self.shown[name].show_difference(method.numbers[name].minus(other.numbers[name]))

    def largest_layer(self, pattern: str) -> str:
        """The layer with the most weights; the last of equal ones."""
        weights = self.settings["weights"][pattern]
        return max(reversed(list(weights)), key=lambda layer: weights[layer])

    def total_pull(self, lambda_w: float) -> float:
        """Sum over all steps of learning rate * lambda_w."""
        return float(lambda_w * self.settings["rate_sum"])

    def _row(self, entry: Data) -> Row:
        epochs, last, pattern = entry["epochs"], entry["epochs"][-1], entry["pattern"]
        # Only methods that remember masks of blocks have these.
        kept = {layer: np.array(rows) for layer, rows in last.get("kept_rows", {}).items()}
        weights = sum(self.settings["weights"][pattern].values())
        values = {
            **{metric.name: last["test"][metric.name] for metric in self.metrics},
            "metric": last["test"][self.metric.name],
            "loss": last["test"]["loss"],
            "train_loss": last["train_loss"],
            "sad": _curve(epochs, "sad_first")[:, -1] / weights,
            "flip_rate": _curve(epochs, "flip_rate").mean(axis=1),
            "density": last["density"],
        }
        if kept:
            values["balance"] = np.mean([balance(rows) for rows in kept.values()], axis=0)
            values["regrown"] = _curve(epochs, "regrown").mean(axis=1)
        numbers = {name: Summary(tuple(map(float, found))) for name, found in values.items()}
        times = {(t["pattern"], t["method"]): t["ratio"] for t in self.data.get("step_times", ())}
        ratio = times.get((pattern, entry["method"]))
        part, method, strength = (entry[name] for name in ("part", "method", "lambda_w"))
        return Row(part, pattern, method, strength, epochs, numbers, kept, ratio)


def balance(kept: np.ndarray) -> np.ndarray:
    """Mean over the rows divided by their maximum, (..., rows) -> (...): 1 is perfect balance."""
    return np.asarray(kept.mean(axis=-1) / kept.max(axis=-1))


def _curve(epochs: list[Data], name: str) -> np.ndarray:
    # Numbers that were not finite are null in the file and become NaN here.
    nothing = [np.nan] * len(epochs[0]["train_loss"])
    if name.startswith("test."):
        return np.array([epoch["test"].get(name[5:], nothing) for epoch in epochs], float).T
    return np.array([epoch[name] for epoch in epochs], float).T
