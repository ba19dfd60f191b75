"""The numbers of a comparison, read from `results.json`: one row for each trial that ended."""

from __future__ import annotations

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
    """How one number of a row is shown."""

    title: str
    scale: float  # From the number to what is shown.
    form: str  # Format of the scaled number.
    unit: str = ""  # Of differences.
    has_error: bool = True  # Whether tables show the standard error.

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


class Row(NamedTuple):
    """A trial that ended: its part, pattern, method and strength, as `Trial` has them.

    Attributes:
      epochs: what was measured in each epoch.
      kept: layer -> blocks kept in each row at the end, (seeds, rows); empty for methods that
        remember no masks of blocks.
      ratio: time of a step over that of dense; None if it was not measured.
      numbers: name -> summary at the end of training. "metric" is the first metric of the task,
        and "sad" the fraction of mask entries that differ from the initial weights' masks.
        "flip_rate" and "regrown" are means over the epochs. "balance" and "regrown" exist where
        `kept` does.
    """

    part: str
    pattern: str
    method: str
    lambda_w: float
    epochs: list[Data]
    kept: dict[str, np.ndarray]
    ratio: float | None
    numbers: dict[str, Summary]

    def curve(self, name: str) -> np.ndarray:
        """One number over time, (seeds, epochs); "test.x" is NaN in epochs without evaluation."""
        # Numbers that were not finite are null in the file and become NaN here.
        nothing = [np.nan] * len(self.epochs[0]["train_loss"])
        if name.startswith("test."):
            return np.array([e["test"].get(name[5:], nothing) for e in self.epochs], float).T
        return np.array([epoch[name] for epoch in self.epochs], float).T


class Run:
    """A comparison, finished or not: `rows` has the trials that ended, in the order of training.

    Methods are compared by `metric`, the first of `metrics`; `shown` is name -> how it is shown.
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

    def groups(self, part: str) -> dict[str, list[Row]]:
        """Pattern -> the rows of a part; rows of blocks come after what is beside them."""
        groups: dict[str, list[Row]] = {}
        for row in self.part(part):
            first = self.beside(row.pattern) if part == "blocks" else []
            groups.setdefault(row.pattern, first).append(row)
        return groups

    def find(self, pattern: str, method: str) -> Row | None:
        """The row of a method in a pattern's table, including the N:M rows next to blocks."""
        # Not the part "sweep": it has rows of the same pattern and method with other strengths.
        rows = [r for part in ("main", "blocks") for r in self.groups(part).get(pattern, ())]
        found = [row for row in rows if row.method == method]
        # A row of the pattern itself comes before one that is only beside it.
        return max(found, key=lambda row: row.pattern == pattern, default=None)

    def beside(self, pattern: str) -> list[Row]:
        """What a pattern of blocks is compared with: dense, and SR-STE at the same density."""
        density, trained = self.settings["density"], self.part("main", "beside")
        # Dense training is the same at every pattern, so one row stands for all.
        return [row for row in trained if row.method == "dense"][:1] + [
            row
            for row in trained
            if row.method == "sr_ste" and np.isclose(density[row.pattern], density[pattern])
        ]

    def sweep(self, *, decoupled: bool = False) -> list[Row]:
        """STE and all strengths of SR-STE, ascending; or those after the preconditioner."""
        # Only the last pattern is swept.
        pattern = self.settings["patterns"][-1]
        family = ("ste", "sr_ste_decoupled") if decoupled else ("ste", "sr_ste", "sr_ste_negative")
        rows = [row for row in self.part("main", "sweep") if row.pattern == pattern]
        return sorted((r for r in rows if r.method in family), key=lambda row: row.lambda_w)

    def best(self, rows: list[Row]) -> Row | None:
        """The row with the best mean of the metric, if there is one."""
        sign = self.metric.sign
        return max(rows, key=lambda row: sign * row.numbers["metric"].mean, default=None)

    def gap(self, method: Row, other: Row, name: str = "metric") -> str:
        """The paired difference of two rows as text."""
        return self.shown[name].show_difference(method.numbers[name].minus(other.numbers[name]))

    def largest_layer(self, pattern: str) -> str:
        """The layer with the most weights; the last of equal ones."""
        weights = self.settings["weights"][pattern]
        return max(reversed(list(weights)), key=lambda layer: weights[layer])

    def _row(self, entry: Data) -> Row:
        epochs, last, pattern = entry["epochs"], entry["epochs"][-1], entry["pattern"]
        kept = {layer: np.array(rows) for layer, rows in last.get("kept_rows", {}).items()}
        times = {(t["pattern"], t["method"]): t["ratio"] for t in self.data.get("step_times", ())}
        part, method, strength = (entry[name] for name in ("part", "method", "lambda_w"))
        row = Row(
            part, pattern, method, strength, epochs, kept, times.get((pattern, method)), numbers={}
        )
        weights = sum(self.settings["weights"][pattern].values())
        values = {
            **{metric.name: last["test"][metric.name] for metric in self.metrics},
            "metric": last["test"][self.metric.name],
            "loss": last["test"]["loss"],
            "train_loss": last["train_loss"],
            "sad": row.curve("sad_first")[:, -1] / weights,
            "flip_rate": row.curve("flip_rate").mean(axis=1),
            "density": last["density"],
        }
        if kept:
            values["balance"] = np.mean([balance(rows) for rows in kept.values()], axis=0)
            values["regrown"] = row.curve("regrown").mean(axis=1)
        for name, found in values.items():
            row.numbers[name] = Summary(tuple(map(float, found)))
        return row


def balance(kept: np.ndarray) -> np.ndarray:
    """Mean over the rows divided by their maximum, (..., rows) -> (...): 1 is perfect balance."""
    return np.asarray(kept.mean(axis=-1) / kept.max(axis=-1))
