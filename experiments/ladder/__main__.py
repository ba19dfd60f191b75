"""Trains the ladder of a task, and prints the ladder of a folder.

`python -m experiments.ladder FOLDER --task digits --patterns 1:16` tunes every method with the same
budget on the validation split, trains the chosen setting on fresh seeds, and prints the table. The
same command continues after Ctrl-C and ends with the same numbers. Without --task it only prints
what the folder holds, which may also come from `python -m experiments.compare`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from experiments.checkpointing.run_folder import take
from experiments.distributed.seeds import use_every_core
from experiments.distributed.stopping import INTERRUPTED, ending_at_the_second
from experiments.json_files import Numbers, read_json
from experiments.ladder.rungs import RUNGS
from experiments.ladder.runs import Flags, Ladder
from experiments.ladder.table import ladder
from experiments.report.numbers import Run
from experiments.training.results import Results


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        if args.task is not None:
            with ending_at_the_second():
                run(args.folder, _flags(args), Console(stderr=True))
        print(ladder(Run(read_json(args.folder / "results.json")), args.reference), end="")
    except (ValueError, FileNotFoundError) as error:
        # Shared code names the flags of other commands.
        text = str(error).replace("Drop --resume, or give another --name", "Give another folder")
        print(f"error: {text.replace('another --name', 'another folder')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return INTERRUPTED
    return 0


def run(folder: Path, flags: Flags, console: Console) -> None:
    """Trains what the folder does not hold yet, and times a step of each method.

    Raises:
      ValueError: the folder is in use, or was made with other settings.
    """
    made = Ladder(flags)
    lock = take(folder)
    try:
        results = Results(folder, made.settings, resume=True)
        if _train(made, results, console) or "step_times" not in results.data:
            results.data["step_times"] = made.time_steps(results)
            results.save()
    finally:
        lock.close()


def _train(made: Ladder, results: Results, console: Console) -> int:
    """Trains the unfinished trials under a progress bar; returns how often it trained."""
    task, trained = made.tasks["main"], 0
    steps = task.recipe.epochs * task.steps_per_epoch
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("")
        for part, pattern, method, settings in made.waiting(results):
            name, trained = f"{pattern} {method}, {part}", trained + 1
            progress.reset(bar, total=steps, description=name)
            made.run(part, pattern, method, settings, results, lambda: progress.advance(bar))
            for setting in settings:
                entry = results.find(made.trial(part, pattern, method, setting)) or {}
                progress.console.print(f"{name}, {setting.title}: {_found(made, entry)}")
    return trained


def _found(made: Ladder, entry: Numbers) -> str:
    """The mean of the first metric and the time, or the error."""
    metric = made.tasks["main"].metrics[0]
    if entry["error"]:
        return str(entry["error"])
    mean = metric.scale * np.mean(entry["epochs"][-1]["test"][metric.name])
    return f"{metric.title} {mean:.{metric.digits}f}, {entry['seconds']:.0f} s"


def _flags(args: argparse.Namespace) -> Flags:
    names = [field.name for field in dataclasses.fields(Flags)]
    given: dict[str, Any] = {name: getattr(args, name) for name in names}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    given |= lists
    return Flags(**{name: value for name, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="of the ladder, or of `python -m experiments.compare`")
    add("--reference", default="sr_ste", help="compared with (default: %(default)s)")
    add("--task", help="with a validation split: digits, python_bytes or number_names")
    add("--patterns", nargs="+", default=["1:16"], help="default: 1:16")
    add("--methods", nargs="+", help=f"default: all that fit; of {', '.join(RUNGS)}")
    add("--tuning-seeds", nargs="+", type=int, help="default: 100 101")
    add("--seeds", nargs="+", type=int, help="default: 200 to 205")
    add("--epochs", type=int, help="default: the task's own")
    return parser


if __name__ == "__main__":
    use_every_core(os.cpu_count() or 1)
    sys.exit(main())
