"""Compares sparse training methods on one task and writes a table, pictures and an HTML report.

`python -m experiments.compare` is the main job: scikit-learn's digits, a small ResNet, every
method at an easy and a hard pattern, N:M and 1xN, several seeds trained together, in minutes on
two cores. `--task` picks another task, with that task's own default comparison.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import nmjax
from experiments.checkpointing.run_folder import Earlier, open_folder
from experiments.distributed.processes import leave_if_interrupted
from experiments.distributed.seeds import fastest, stack, use_every_core
from experiments.distributed.stopping import INTERRUPTED, ending_at_the_second
from experiments.json_files import Numbers
from experiments.report.snapshots import block_masks, example_images, kernel_shapes, shown
from experiments.report.step_times import step_times
from experiments.tasks.task import Compared, Task, total_rate
from experiments.training.finding import task_names
from experiments.training.flags import Flags as TrainFlags
from experiments.training.flags import as_flags, make_task
from experiments.training.job import Job, assemble_job, plan_of
from experiments.training.loop import begin, train
from experiments.training.methods import (
    NEGATIVE_FRACTION,
    check_fits,
    find_row,
    is_blocks,
)
from experiments.training.results import Results, Trial, brief_epoch_numbers
from experiments.training.step import Programs, RunState, make_programs

TIMED_STEPS = 40
PAPER_LAMBDA_W = 2e-4


@dataclass(frozen=True)
class Flags:
    """Compares sparse training methods; writes tables, pictures and an HTML report to runs/NAME/.

    Without flags, this is what `make train` runs. Ctrl-C leaves a report of the finished trials;
    --resume continues. Flags that are None or empty use the task's own defaults.

    Attributes:
      task: task to train on: a file in experiments/tasks, or PACKAGE.MODULE:FUNCTION.
      model: model to train. Empty for the task's default.
      data_dir: folder of prepared data sets. None for $TFDS_DATA_DIR or ~/tensorflow_datasets.
      patterns: N:M patterns, N weights kept of every M. The last one also gets a lambda_w sweep.
      methods: methods to compare. Step times are relative to dense.
      block_patterns: 1xN@S patterns: blocks of N outputs, and the fraction S dropped. They are
        compared with dense and with SR-STE at the same density. If no N:M pattern has that density,
        SR-STE is also trained at 1:M.
      block_methods: methods to compare at the block patterns.
      seeds: seeds for the initial weights and the data order. All train together; on two cores, an
        even number of seeds is fastest.
      epochs: passes over the training data.
      lambda_w: strength of the sparse-refined term, as part of the gradient.
      lambda_decoupled: its strength after the preconditioner, for sr_ste_decoupled.
      sweep: multiples of the strength at which SR-STE is also trained, for both kinds if both are
        compared. A sweep always includes the paper's own 2e-4.
      shapes: pattern of one more SR-STE run, for a picture of its kernel shapes. Empty for none.
      evaluate_every: epochs between two points of the accuracy curves. None for 12 points.
      name: name of the folder. None for the task's name.
      runs_dir: folder of all runs.
      resume: keep the finished trials in the folder; otherwise start over.
    """

    task: str = "digits"
    model: str = ""
    data_dir: Path | None = None
    patterns: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    block_patterns: tuple[str, ...] | None = None
    block_methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    epochs: int | None = None
    lambda_w: float | None = None
    lambda_decoupled: float | None = None
    sweep: tuple[float, ...] | None = None
    shapes: str | None = None
    evaluate_every: int | None = None
    name: str | None = None
    runs_dir: Path = Path("runs")
    resume: bool = False

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.runs_dir / (self.name or self.task.replace(":", "_"))


class Comparison:
    """The trials of one comparison, and the compiled programs that they share."""

    def __init__(self, flags: Flags) -> None:
        """Makes the task and lists the trials.

        Raises:
          ValueError: a flag has an unsupported value.
        """
        for pattern, method in product(flags.patterns or (), flags.methods or ()):
            check_fits(method, pattern)
        self.flags = flags
        given = TrainFlags(
            task=flags.task,
            model=flags.model,
            data_dir=flags.data_dir,
            epochs=flags.epochs,
            lambda_w=flags.lambda_w,
            lambda_decoupled=flags.lambda_decoupled,
            seeds=(0,) if flags.seeds is None else flags.seeds,
            evaluate_every=1 if flags.evaluate_every is None else flags.evaluate_every,
            name=flags.name,
            runs_dir=flags.runs_dir,
        )
        if not all(map(math.isfinite, flags.sweep or ())):
            raise ValueError(f"sweep must be finite numbers, got {flags.sweep}")
        if flags.patterns == ():
            raise ValueError("patterns must name at least one pattern, such as 2:4")
        self.model = given.model_name
        self.task: Task = make_task(given)
        self.compared = _changed(self.task.compared, flags)
        main = product(self.compared.patterns, self.compared.methods)
        blocks = product(self.compared.block_patterns, self.compared.block_methods)
        for pattern, method in (*main, *blocks):
            check_fits(method, pattern)
        self._jobs: dict[tuple[str, Any, bool], tuple[Job, Programs]] = {}

    @cached_property
    def trials(self) -> list[Trial]:
        """All trials: pattern by pattern, the sweep, the run for the shapes, then the blocks."""
        chosen = self.compared
        main = [self._trial("main", *pair) for pair in product(chosen.patterns, chosen.methods)]
        shapes = [self._trial("shapes", chosen.shapes, "sr_ste")] if chosen.shapes else []
        beside = [self._trial("beside", p, "sr_ste") for p in _missing_densities(chosen)]
        blocks = [
            self._trial("blocks", *pair)
            for pair in product(chosen.block_patterns, chosen.block_methods)
        ]
        return main + self._sweep() + shapes + beside + blocks

    def _sweep(self) -> list[Trial]:
        """SR-STE of each kind at the last pattern, with further strengths."""
        found = []
        for method in ("sr_ste", "sr_ste_decoupled"):
            trial = self._trial("sweep", self.compared.patterns[-1], method)
            strengths = {factor * trial.lambda_w for factor in self.compared.sweep}
            strengths |= {PAPER_LAMBDA_W} if strengths and method == "sr_ste" else set()
            found += [
                dataclasses.replace(trial, lambda_w=strength)
                for strength in sorted(strengths - {trial.lambda_w})
                if method in self.compared.methods
            ]
        return found

    def _trial(self, part: str, pattern: str, method: str) -> Trial:
        strength = find_row(method).strength(self.task.recipe)
        return Trial(part, pattern, method, strength, self.compared.seeds)

    def settings(self) -> Numbers:
        """Everything that decides the numbers, as JSON stores it."""
        chosen, task = self.compared, self.task
        params = jax.eval_shape(task.init, jax.random.key(0))["params"]
        plans = {pattern: plan_of(task, pattern) for pattern in {t.pattern for t in self.trials}}
        return {
            "task": task.name,
            "model": self.model,
            "patterns": chosen.patterns,
            "block_patterns": chosen.block_patterns,
            "seeds": chosen.seeds,
            "recipe": dataclasses.asdict(task.recipe),
            "metrics": [dataclasses.asdict(metric) for metric in task.metrics],
            "baselines": dict(task.baselines),
            "notes": task.notes,
            "identity": dict(task.identity),
            "keep_dense": task.keep_dense,
            "steps_per_epoch": task.steps_per_epoch,
            "rate_sum": total_rate(task.recipe, task.steps_per_epoch),
            "evaluate_every": self.evaluate_every,
            "negative_fraction": NEGATIVE_FRACTION,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "weights": {p: {n: plans[p][n].weights for n in plans[p]} for p in sorted(plans)},
            "blocks": {
                pattern: {name: leaf.shape[leaf.reduction_axes[0]] for name, leaf in plan.items()}
                for pattern, plan in plans.items()
                if is_blocks(pattern)
            },
            "density": {p: nmjax.parse_pattern(p).density for p in sorted(plans)},
        }

    @property
    def evaluate_every(self) -> int:
        """Epochs between two evaluations."""
        return self.flags.evaluate_every or max(1, self.task.recipe.epochs // 12)

    def job(self, trial: Trial) -> tuple[Job, Programs]:
        """Job and programs of a trial; trials that differ only in `lambda_w` share them."""
        build, several = find_row(trial.method).build, len(trial.seeds) > 1
        key = (trial.pattern, build, several)
        if key not in self._jobs:
            job = assemble_job(self.task, trial.method, trial.pattern)
            over_seeds = fastest(len(trial.seeds)) if several else None
            self._jobs[key] = job, make_programs(job, over_seeds=over_seeds)
        return self._jobs[key]

    def run(self, trial: Trial, results: Results, on_step: Callable[[], None]) -> None:
        """Trains a trial and adds it to the results."""
        job, programs = self.job(trial)
        began, epochs, film, error = time.perf_counter(), [], [], ""
        state: RunState | None = None
        reports = train(
            job,
            seeds=trial.seeds,
            lambda_w=trial.lambda_w,
            programs=programs,
            evaluate_every=self.evaluate_every,
            on_step=lambda steps, state: on_step(),
        )
        try:
            for report in reports:
                epochs.append(brief_epoch_numbers(report))
                state = report.state
                if report.blocks and report.test:
                    film.append({"epoch": report.epoch, **block_masks(job, state)})
        except FloatingPointError as stopped:
            error = str(stopped)
        if trial.part == "shapes" and state is not None and not error:
            results.data["shapes"] = kernel_shapes(job, state)
        if trial.part == "main" and state is not None and not error:
            results.data.setdefault("shown", {})[trial.title] = shown(job, programs, state)
        if film and not error:
            results.data.setdefault("films", {})[f"{trial.pattern} {trial.method}"] = film
        results.add(trial, epochs, time.perf_counter() - began, error)

    def time_steps(self) -> list[Numbers]:
        """Times a step of every method at every pattern, in turn."""
        seeds = self.compared.seeds
        batches = [next(iter(self.task.train_batches(seed, 0))) for seed in seeds]
        batch = stack(batches) if len(seeds) > 1 else batches[0]
        chosen = {}
        for trial in self.trials:
            if trial.part == "main":
                programs = self.job(trial)[1]
                state = begin(programs, seeds, trial.lambda_w).train
                chosen[trial.pattern, trial.method] = programs.step, state, batch
        return step_times(chosen, rounds=TIMED_STEPS)


def _changed(compared: Compared, flags: Flags) -> Compared:
    """What is compared: the task's own defaults, changed by the flags that were given."""
    given = {entry.name: getattr(flags, entry.name) for entry in dataclasses.fields(compared)}
    return dataclasses.replace(
        compared, **{name: value for name, value in given.items() if value is not None}
    )


def _missing_densities(chosen: Compared) -> list[str]:
    """Patterns 1:M, M a power of two, for blocks whose density no N:M pattern has yet."""
    there = [nmjax.parse_pattern(pattern).density for pattern in chosen.patterns]
    found = []
    for pattern in chosen.block_patterns if "sr_ste" in chosen.methods else ():
        density = nmjax.parse_pattern(pattern).density
        m = round(1 / density)
        if m & (m - 1) == 0 and 1 / m == density and density not in there:
            found.append(f"1:{m}")
    return list(dict.fromkeys(found))


def compare(flags: Flags, console: Console) -> int:
    """Runs the comparison and writes its report.

    Returns:
      The exit status: 0, or 130 if Ctrl-C cut it short.
    """
    comparison = Comparison(flags)
    for note in comparison.task.notes:
        console.print(note)
    settings = comparison.settings()
    # A comparison starts over, so that `make train` can be repeated. It never replaces a training
    # run, which has no results.json.
    begun: Earlier = "replace" if (flags.folder / "results.json").exists() else "refuse"
    earlier: Earlier = "resume" if flags.resume else begun
    release = open_folder(flags.folder, settings, earlier=earlier)
    try:
        return _finish(comparison, Results(flags.folder, settings, resume=flags.resume), console)
    finally:
        release()


def _finish(comparison: Comparison, results: Results, console: Console) -> int:
    from experiments.report.next_steps import next_steps
    from experiments.report.page import write_report
    from experiments.report.tables import print_table

    results.data["examples"] = example_images(comparison.task)
    results.save()
    status = 0
    try:
        trained = run_trials(comparison, results, console)
        if trained or "step_times" not in results.data:
            results.data["step_times"] = comparison.time_steps()
            results.save()
    except KeyboardInterrupt:
        done = len(results.data["trials"])
        console.print(
            f"stopped: {done} of {len(comparison.trials)} trials are in the report; --resume "
            "continues with the others"
        )
        status = INTERRUPTED
    print_table(results.data, console)
    path = write_report(results.data, comparison.flags.folder)
    console.print(f"report: {path}")
    for line in next_steps(results.data, path) if status == 0 else ():
        # The terminal wraps long lines, so that commands can be copied whole.
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return status


def run_trials(comparison: Comparison, results: Results, console: Console) -> int:
    """Runs the unfinished trials under a progress bar; returns their number."""
    waiting = [trial for trial in comparison.trials if results.find(trial) is None]
    steps = comparison.task.recipe.epochs * comparison.task.steps_per_epoch
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    work = [steps * (2 + len(trial.seeds)) for trial in waiting]
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        bar = progress.add_task("", total=sum(work))
        for index, trial in enumerate(waiting):
            progress.update(bar, description=f"{trial.title} ({index + 1} of {len(waiting)})")
            advance = partial(progress.advance, bar, 2 + len(trial.seeds))
            comparison.run(trial, results, advance)
            progress.update(bar, completed=sum(work[: index + 1]))
            progress.console.print(_line(results, trial))
    return len(waiting)


def _line(results: Results, trial: Trial) -> str:
    entry = results.find(trial) or {}
    seconds = f"{entry['seconds']:.1f} s"
    if entry["error"]:
        return f"{trial.title}: {seconds}, {entry['error']}"
    test = entry["epochs"][-1]["test"]
    means = ", ".join(f"{name} {np.mean(values):.4f}" for name, values in test.items())
    return f"{trial.title}: {means} ({seconds})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m experiments.compare`."""
    tasks = f"Tasks: {', '.join(task_names())}."
    about = f"{(Flags.__doc__ or '').partition('Attributes:')[0].strip()}\n\n{tasks}"
    flags = tyro.cli(Flags, args=argv, prog="python -m experiments.compare", description=about)
    try:
        with ending_at_the_second():
            return compare(flags, Console())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {as_flags(str(error), 'Choose other patterns.')}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    use_every_core(os.cpu_count() or 1)
    exit_status = main()
    leave_if_interrupted(exit_status)
    sys.exit(exit_status)
