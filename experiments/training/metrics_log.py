"""What a run measured, as `metrics.jsonl`: one JSON object an epoch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from experiments.training.loop import EpochReport
from nmjax.files.whole_files import write_whole


class MetricsLog:
    """The file `metrics.jsonl` of a run's folder."""

    def __init__(self, folder: Path) -> None:
        """Names the file; it is made by the first line."""
        self._path = folder / "metrics.jsonl"

    def read(self) -> list[dict[str, Any]]:
        """All lines, but for a last one that was cut off while it was written."""
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append(self, report: EpochReport, steps_per_epoch: int) -> None:
        """Writes an epoch's line: numbers of the report, in lists with one entry a seed."""
        with self._path.open("a") as file:
            file.write(json.dumps(_line(report, steps_per_epoch)) + "\n")

    def keep_until(self, epoch: int) -> None:
        """Drops the lines of later epochs, which will be trained again."""
        kept = [line for line in self.read() if line["epoch"] <= epoch]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self._path, lambda part: part.write_text(text))


def _line(report: EpochReport, steps_per_epoch: int) -> dict[str, Any]:
    line = {
        "epoch": report.epoch,
        "step": report.epoch * steps_per_epoch,
        "seconds": report.seconds,
        "train_loss": _plain(report.train_loss),
        "test": _plain(report.test),
        "sad_first": _plain(report.sad_first),
        "sad_epoch": _plain(report.sad_epoch),
        "flip_rate": _plain(report.flip_rate),
        "density": _plain(report.density),
    }
    return {**line, "blocks": _plain(report.blocks)} if report.blocks else line


def _plain(value: Any) -> Any:
    """Numbers, lists and dicts as JSON has them; what is not finite becomes null."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(entry) for entry in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
