"""What epochs and trials found: lines of a run's `metrics.jsonl`, a comparison's `results.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from experiments.json_files import Numbers, differences, machine, plain, read_json, write_json
from experiments.training.loop import EpochReport

# Enough for every table and picture, and a third of the bytes.
_DIGITS = 6


def epoch_numbers(report: EpochReport) -> Numbers:
    """Returns the numbers of a report, without its state and its seconds."""
    unwanted = {"state", "seconds"} if report.blocks else {"state", "seconds", "blocks"}
    return {name: value for name, value in vars(report).items() if name not in unwanted}


def brief_epoch_numbers(report: EpochReport) -> Numbers:
    """Returns `epoch_numbers` summed over layers; only evaluated epochs keep those of each."""
    numbers = epoch_numbers(report)
    layers, blocks = numbers["sad_first"], numbers.pop("blocks", {})
    numbers["sad_first"] = np.sum(list(layers.values()), axis=0)
    if blocks:
        numbers |= {"sad_used": blocks["sad"], "regrown": blocks["regrown"]}
    if report.test:
        numbers["sad_layers"] = layers
        numbers |= {"kept_rows": blocks["kept_rows"]} if blocks else {}
    return numbers


@dataclass(frozen=True)
class Trial:
    """One method at one pattern with one strength, for all seeds, which train together.

    Parts are "main" for the table; "sweep" for further strengths of SR-STE; "shapes" for the run
    whose kernels are drawn; "blocks" for 1xN patterns, "beside" for their N:M rivals.
    """

    part: str
    pattern: str  # Such as "2:4".
    method: str  # A row of `experiments.training.methods.METHODS`.
    lambda_w: float  # 0 where the method has none.
    seeds: tuple[int, ...]

    @property
    def title(self) -> str:
        """For progress bars and messages."""
        strength = f", lambda_w {self.lambda_w:.2g}" if self.lambda_w else ""
        return f"{self.pattern} {self.method}{strength}"


class Results:
    """What a comparison has found so far: `data`, the content of `folder/results.json`.

    "settings" decides the numbers, "trials" has an entry with its epochs for each finished trial,
    "step_times", "shapes", "films" and "shown" are extra.
    """

    def __init__(self, folder: Path, settings: Numbers, *, resume: bool) -> None:
        """Starts over, or continues with what the folder holds.

        Raises:
          ValueError: the results there are damaged, or come from other settings.
        """
        self.path = folder / "results.json"
        settings = plain(settings, _DIGITS)
        self.data: Numbers = {"settings": settings, "machine": machine(), "trials": []}
        if resume and self.path.exists():
            self.data = read_json(self.path)
            # The folder's settings are replaced first, so a run killed between the two leaves the
            # results of an earlier one.
            if changed := differences(settings, self.data["settings"]):
                raise ValueError(
                    f"{self.path} was made with other settings: {changed}. Drop --resume, or give "
                    "another --name"
                )

    def find(self, trial: Trial) -> Numbers | None:
        """Returns the entry of a finished trial."""
        wanted = plain(asdict(trial), _DIGITS).items()
        entries: list[Numbers] = self.data["trials"]
        return next((entry for entry in entries if wanted <= entry.items()), None)

    def add(self, trial: Trial, epochs: list[Numbers], seconds: float, error: str) -> None:
        """Adds a finished trial, or one that an error ended, and saves."""
        entry = {**asdict(trial), "seconds": seconds, "error": error, "epochs": epochs}
        self.data["trials"].append(entry)
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        # The report of a comparison must be the same now and after it is read back.
        self.data = plain(self.data, _DIGITS)
        write_json(self.path, self.data, separators=(",", ":"))
