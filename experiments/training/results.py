"""The results of a comparison as one JSON file: what was run, where, and what came out."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

from experiments.training.loop import EpochReport
from nmjax.files.whole_files import write_whole

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One method at one pattern with one strength, for all seeds.

    Attributes:
      part: "main" for the table; "sweep" for further strengths of SR-STE; "shapes" for the run
        whose kernels are drawn; "blocks" for 1xN patterns, "beside" for what is set beside them.
      pattern: such as "2:4".
      method: a row of `experiments.training.methods.METHODS`.
      lambda_w: strength of the sparse-refined term; 0 where the method has none.
      seeds: trained together.
    """

    part: str
    pattern: str
    method: str
    lambda_w: float
    seeds: tuple[int, ...]

    @property
    def title(self) -> str:
        """For progress bars and messages."""
        strength = f", lambda_w {self.lambda_w:.2g}" if self.lambda_w else ""
        return f"{self.pattern} {self.method}{strength}"


class Results:
    """What a comparison has found so far, in `folder/results.json`.

    Attributes:
      data: the content of the file. "settings" decides the numbers, "trials" holds one entry a
        finished trial with its epochs, "step_times", "shapes", "films" and "shown" are extra.
    """

    def __init__(self, folder: Path, data: Numbers) -> None:
        """Holds `data`; `save` writes it."""
        self.path = folder / "results.json"
        self.data = data

    @classmethod
    def open(cls, folder: Path, settings: Numbers, *, resume: bool) -> Results:
        """Starts anew, or goes on from the file in `folder`.

        Raises:
          ValueError: the file there comes from other settings.
        """
        settings = _plain(settings)
        fresh: Numbers = {"settings": settings, "machine": machine(), "trials": []}
        results = cls(folder, fresh)
        if resume and results.path.exists():
            results.data = json.loads(results.path.read_text())
            changed = sorted(
                name
                for name in settings.keys() | results.data["settings"].keys()
                if settings.get(name) != results.data["settings"].get(name)
            )
            if changed:
                raise ValueError(
                    f"{results.path} was made with another {', '.join(changed)}; drop --resume or "
                    "give another --name"
                )
        return results

    def find(self, trial: Trial) -> Numbers | None:
        """The entry of a finished trial."""
        for entry in self.data["trials"]:
            if all(entry[name] == value for name, value in _plain(asdict(trial)).items()):
                return dict(entry)
        return None

    def add(self, trial: Trial, reports: list[Numbers], seconds: float, error: str = "") -> None:
        """Adds a finished trial, or one that an error ended, and saves."""
        entry = {**asdict(trial), "seconds": seconds, "error": error, "epochs": reports}
        self.data["trials"].append(_plain(entry))
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(self.data), separators=(",", ":")) + "\n"
        write_whole(self.path, lambda part: part.write_text(text))


def epoch_numbers(report: EpochReport) -> Numbers:
    """The numbers of a report, without its state.

    "sad_first" is summed over the layers; epochs that were evaluated have "sad_layers" too. Where
    masks of blocks are remembered, "sad_used" and "regrown" are there, and "kept_rows" where the
    epoch was evaluated.
    """
    names = ("epoch", "train_loss", "test", "sad_epoch", "flip_rate", "density")
    numbers: Numbers = {name: getattr(report, name) for name in names}
    numbers["sad_first"] = np.sum(list(report.sad_first.values()), axis=0)
    if report.test:
        numbers["sad_layers"] = report.sad_first
    if report.blocks:
        numbers |= {"sad_used": report.blocks["sad"], "regrown": report.blocks["regrown"]}
        if report.test:
            numbers["kept_rows"] = report.blocks["kept_rows"]
    return dict(_plain(numbers))


def machine() -> Numbers:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": f"{jax.device_count()} x {device.platform} ({device.device_kind})",
        "system": platform.platform(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (jax, flax, optax, np)},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """Numbers, lists and dicts as JSON has them: floats to six digits, null if not finite."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
