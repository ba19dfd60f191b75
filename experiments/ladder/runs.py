"""The runs of the ladder: every method tuned on the validation split, then tested on fresh seeds.

A finished trial is never trained again, and an interrupted one starts over, so a run that is
resumed ends with the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from experiments.distributed.seeds import fastest, stack
from experiments.json_files import Numbers
from experiments.ladder.rungs import RUNGS, Setting
from experiments.report.step_times import step_times
from experiments.tasks.options import Options
from experiments.tasks.task import Task
from experiments.training.finding import default_model, find_task
from experiments.training.job import Job, plan_of
from experiments.training.loop import begin, train
from experiments.training.methods import Strengths
from experiments.training.results import Results, Trial, brief_epoch_numbers
from experiments.training.step import Programs, make_programs

TIMED_STEPS = 30


@dataclass(frozen=True)
class Flags:
    """What the ladder trains.

    Attributes:
      task: one with a validation split.
      patterns: each is a ladder of its own.
      methods: of `RUNGS`; empty for all that fit the task's recipe. Can be extended later.
      tuning_seeds: train every setting of a method on the part that is not held out.
      seeds: train the chosen one on all training data; other ones, so that no method is tested on
        the luck that it was chosen for.
      epochs: passes over the training data; None for the task's.
    """

    task: str
    patterns: tuple[str, ...]
    methods: tuple[str, ...] = ()
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = (200, 201, 202, 203, 204, 205)
    epochs: int | None = None

    def __post_init__(self) -> None:
        """Rejects methods that do not exist, and seeds that are used twice."""
        if unknown := [name for name in self.methods if name not in RUNGS]:
            raise ValueError(f"no method named {unknown[0]!r}; choose from {', '.join(RUNGS)}")
        if len({*self.tuning_seeds, *self.seeds}) < len(self.tuning_seeds) + len(self.seeds):
            raise ValueError(f"seeds occur twice in {self.tuning_seeds} and {self.seeds}")
        if not self.tuning_seeds or len(self.seeds) < 2:
            raise ValueError("needs at least one seed to tune and two to test")


@dataclass(frozen=True)
class LadderTrial(Trial):
    """A trial of one setting; part "tuning" on the validation split, "main" on the test data."""

    setting: str = ""


class Ladder:
    """The trials of the ladder, and the compiled programs that they share.

    The settings of a method differ only in numbers that its program takes as arguments, so they
    train together. With as many test seeds as settings times tuning seeds, one compilation serves
    both.
    """

    def __init__(self, flags: Flags) -> None:
        """Makes the task with both splits.

        Raises:
          ValueError: a flag has an unsupported value, or the task has no validation split.
        """
        self.flags = flags
        self.tasks = {part: self._task(part) for part in ("tuning", "main")}
        has_adam = self.tasks["main"].recipe.optimizer == "adamw"
        if no_adam := [name for name in flags.methods if RUNGS[name].adam and not has_adam]:
            raise ValueError(f"{no_adam[0]} needs Adam, and {flags.task} trains with SGD")
        self.methods = flags.methods or tuple(
            name for name, rung in RUNGS.items() if has_adam or not rung.adam
        )
        self._jobs: dict[tuple[str, str], Job] = {}

    def _task(self, part: str) -> Task:
        options = Options(epochs=self.flags.epochs, validation=part == "tuning")
        return find_task(self.flags.task)(options)

    @cached_property
    def settings(self) -> Numbers:
        """Everything that decides the numbers, except which methods are trained."""
        task, patterns = self.tasks["main"], self.flags.patterns
        plans = {pattern: plan_of(task, pattern) for pattern in patterns}
        return {
            "task": task.name,
            "model": default_model(self.flags.task),
            "patterns": patterns,
            "seeds": self.flags.seeds,
            "tuning_seeds": self.flags.tuning_seeds,
            "recipe": dataclasses.asdict(task.recipe),
            "metrics": [dataclasses.asdict(metric) for metric in task.metrics],
            "identity": dict(task.identity),
            "steps_per_epoch": task.steps_per_epoch,
            "weights": {p: {n: plans[p][n].weights for n in plans[p]} for p in patterns},
            "density": {p: nmjax.parse_pattern(p).density for p in patterns},
        }

    def job(self, pattern: str, method: str) -> Job:
        """Task, plan and method, of the training on all data."""
        if (pattern, method) not in self._jobs:
            task = self.tasks["main"]
            plan = plan_of(task, pattern)
            built = RUNGS[method].build(plan, task.recipe, task.steps_per_epoch)
            self._jobs[pattern, method] = Job(task, plan, built)
        return self._jobs[pattern, method]

    def pull(self, pattern: str, method: str, setting: Setting) -> float:
        """A setting's strength of the sparse-refined term; 0 for methods without it."""
        if not RUNGS[method].pulls:
            return 0.0
        decoupled = self.job(pattern, method).method.decoupled
        return setting.pull * self.tasks["main"].recipe.strength(decoupled=decoupled)

    def strengths(self, pattern: str, method: str, setting: Setting) -> Strengths:
        """What a setting trains with."""
        return Strengths(self.pull(pattern, method, setting), setting.rate, setting.decay)

    def trial(self, part: str, pattern: str, method: str, setting: Setting) -> LadderTrial:
        """A setting's trial: on the validation split, or on the test data."""
        seeds = self.flags.tuning_seeds if part == "tuning" else self.flags.seeds
        strength = self.pull(pattern, method, setting)
        return LadderTrial(part, pattern, method, strength, seeds, setting.title)

    def choose(self, results: Results, pattern: str, method: str) -> Setting:
        """The setting with the best mean on the validation split; the first of equal ones."""
        metric = self.tasks["main"].metrics[0]

        def score(setting: Setting) -> float:
            entry = results.find(self.trial("tuning", pattern, method, setting))
            if entry is None or entry["error"]:
                return -np.inf
            return metric.sign * float(np.mean(entry["epochs"][-1]["test"][metric.name]))

        return max(RUNGS[method].settings, key=score)

    def waiting(self, results: Results) -> Iterator[tuple[str, str, str, list[Setting]]]:
        """What to train, as it becomes known: part, pattern, method and settings."""
        for pattern, method in product(self.flags.patterns, self.methods):
            tuning = list(RUNGS[method].settings)
            trials = [self.trial("tuning", pattern, method, setting) for setting in tuning]
            if any(results.find(trial) is None for trial in trials):
                yield "tuning", pattern, method, tuning
            chosen = self.choose(results, pattern, method)
            if results.find(self.trial("main", pattern, method, chosen)) is None:
                yield "main", pattern, method, [chosen]

    def run(
        self,
        part: str,
        pattern: str,
        method: str,
        settings: Sequence[Setting],
        results: Results,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Trains settings together and adds a trial of each to the results.

        Settings that fail are added with their error, and the others are trained without them.
        """
        began = perf_counter()
        trials = [self.trial(part, pattern, method, setting) for setting in settings]
        given = [self.strengths(pattern, method, setting) for setting in settings]
        count = len(trials[0].seeds)
        try:
            epochs = self._train(part, pattern, method, trials[0].seeds, given, on_step)
        except FloatingPointError as stopped:
            if len(settings) == 1:
                results.add(trials[0], [], perf_counter() - began, str(stopped))
                return
            for setting in settings:
                self.run(part, pattern, method, [setting], results, on_step)
            return
        seconds = (perf_counter() - began) / len(settings)
        for place, trial in enumerate(trials):
            own = slice(place * count, (place + 1) * count)
            results.add(trial, [_cut(epoch, own) for epoch in epochs], seconds, "")

    def _train(
        self,
        part: str,
        pattern: str,
        method: str,
        seeds: Sequence[int],
        given: Sequence[Strengths],
        on_step: Callable[[], None],
    ) -> list[Numbers]:
        job = self.job(pattern, method)
        lanes = tuple(seeds) * len(given)
        columns = (np.repeat(values, len(seeds)) for values in zip(*given, strict=True))
        reports = train(
            job._replace(task=self.tasks[part]),
            seeds=lanes,
            lambda_w=Strengths(*columns),
            # Programs depend on the network and the recipe, which both splits share.
            programs=self._programs(job, len(lanes)),
            evaluate_every=job.task.recipe.epochs,
            on_step=lambda steps, state: on_step(),
        )
        found = [brief_epoch_numbers(report) for report in reports]
        # The ladder shows sums over layers; of the tuning, only its end.
        for epoch in found:
            epoch.pop("sad_layers", None)
        return found[-1:] if part == "tuning" else found

    def _programs(self, job: Job, lanes: int) -> Programs:
        return make_programs(job, over_seeds=fastest(lanes) if lanes > 1 else None)

    def time_steps(self, results: Results) -> list[Numbers]:
        """Times a step of every tested method in turn, as it is at the end of training."""
        task, seeds = self.tasks["main"], self.flags.seeds
        # Before the end, when methods that begin dense are sparse.
        last = np.full(len(seeds), task.recipe.epochs * task.steps_per_epoch - TIMED_STEPS - 2)
        batch = stack([next(iter(task.train_batches(seed, 0))) for seed in seeds])
        found = []
        for pattern in self.flags.patterns:
            timed = {}
            for method in self.methods:
                setting = self.choose(results, pattern, method)
                programs = self._programs(self.job(pattern, method), len(seeds))
                given = self.strengths(pattern, method, setting)
                state = begin(programs, seeds, given).train
                state = state._replace(step=jnp.asarray(last, jnp.int32))
                timed[pattern, method] = programs.step, state, batch
            found += step_times(timed, rounds=TIMED_STEPS, reference="sr_ste")
        return found


def _cut(epoch: Numbers, own: slice) -> Numbers:
    """The numbers of some of the seeds that trained together."""
    return jax.tree.map(lambda value: value[own] if np.ndim(value) else value, epoch)
