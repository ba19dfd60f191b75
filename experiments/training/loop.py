"""One training loop for every task and method.

`train` yields a report after each epoch. It trains one state, or several that differ only in their
seed and share every step. Within an epoch the host never waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from experiments.distributed.placement import HERE, Placement
from experiments.distributed.seeds import one_seed, stack
from experiments.tasks.task import Batch, Rows, Task
from experiments.training.finite import check_finite
from experiments.training.methods import Strengths
from experiments.training.step import Job, Programs, RunState, TrainState, make_programs


@dataclass(frozen=True)
class EpochReport:
    """What one epoch measured. Arrays have one entry a seed.

    Attributes:
      epoch: epochs done.
      train_loss: mean over the epoch's steps.
      test: metric -> mean over the test examples; empty where the epoch was not evaluated.
      sad_first: layer -> mask entries that differ from the initial weights' masks.
      sad_epoch: mask entries, over all layers, that differ from the previous epoch's.
      flip_rate: mean over the watched steps of the fraction of mask entries that one step changes.
      density: fraction of non-zero weights, of the planned leaves, in the forward pass.
      blocks: for methods that remember masks of 1xN blocks. "sad": entries of those masks that
        differ from the previous epoch's. "regrown": blocks that are back since then. "kept_rows":
        layer -> blocks kept in each row of blocks, (seeds, rows).
      seconds: that the epoch took, evaluation included.
      state: the state of training. The next step donates its arrays: save or copy what must last
        before asking for the next report.
    """

    epoch: int
    train_loss: np.ndarray
    test: dict[str, np.ndarray]
    sad_first: dict[str, np.ndarray]
    sad_epoch: np.ndarray
    flip_rate: np.ndarray
    density: np.ndarray
    blocks: dict[str, Any]
    seconds: float
    state: RunState = field(repr=False)


def train(
    job: Job,
    *,
    seeds: Sequence[int] = (0,),
    lambda_w: float | Strengths | None = None,
    programs: Programs | None = None,
    start: RunState | None = None,
    evaluate_every: int = 1,
    watch_every: int = 16,
    placement: Placement = HERE,
    on_step: Callable[[int, RunState], None] = lambda steps, state: None,
) -> Iterator[EpochReport]:
    """Trains, and yields a report after every epoch.

    Args:
      job: task, plan and method. The recipe is the task's.
      seeds: of the initial weights and of the order of the data. Several are trained together.
      lambda_w: strength of the sparse-refined term, and of more; None for the recipe's.
      programs: from `make_programs`, to share their compilation between runs. They must have an
        axis of seeds if and only if there are several, and the placement's layout.
      start: continues from this state, from a report or `on_step`; its arrays are donated.
      evaluate_every: epochs between two evaluations. The last epoch is always evaluated.
      watch_every: steps between two whose mask flips are counted; at least one an epoch is.
      placement: over devices and processes.
      on_step: called after each step is handed to the device, with the number of steps done and
        the state, whose arrays the next step donates as well.

    Yields:
      One report an epoch.

    Raises:
      FloatingPointError: the loss or a variable is not finite; the message names the seed, the
        step and the first such variable.
      ValueError: `programs` does not fit the number of seeds, or an epoch has other steps than the
        task says.
    """
    task = job.task
    programs = programs or make_programs(job, over_seeds=jax.vmap if len(seeds) > 1 else None)
    if programs.seeds != (len(seeds) > 1):
        raise ValueError(
            f"programs made with seeds={programs.seeds} cannot train {len(seeds)} seeds"
        )
    default = task.recipe.strength(decoupled=job.method.decoupled)
    strength = default if lambda_w is None else lambda_w
    state = start if start is not None else begin(programs, seeds, strength)
    # After a checkpoint within an epoch, training continues at the next step and its batches.
    first_epoch, first_step = divmod(state.steps_done(), task.steps_per_epoch)
    for epoch in range(first_epoch, task.recipe.epochs):
        began = time.perf_counter()
        first = first_step if epoch == first_epoch else 0
        rows = placement.rows_of(task.recipe.batch_size)
        batches = map(placement.put, _batches(job, seeds, epoch, first, rows))
        state = _train_epoch(job, programs, state, epoch, first, batches, watch_every, on_step)
        # The state's arrays are still needed after the epoch, so nothing is donated here.
        forward = programs.forward(state.train)
        masks = programs.masks(state.train.params)
        state, measured = programs.close(state, masks, forward)
        done = epoch + 1
        is_due = done % evaluate_every == 0 or done == task.recipe.epochs
        test = evaluate(job, programs, state.train, placement) if is_due else {}
        # The one wait for the device in an epoch that is not evaluated.
        measured = jax.device_get(measured)
        if not programs.seeds:
            measured = one_seed(measured)
        bad = measured.pop("bad_step"), measured.pop("bad_leaf")
        check_finite(*bad, state.train, seeds, task.steps_per_epoch)
        seconds = time.perf_counter() - began
        yield EpochReport(epoch=done, test=test, seconds=seconds, state=state, **measured)


def begin(programs: Programs, seeds: Sequence[int], lambda_w: float | Strengths) -> RunState:
    """The state of epoch 0; the same for the same seeds."""
    # NumPy arrays of fixed dtypes: Python numbers would compile a second time.
    numbers, strengths = jax.tree.map(
        lambda given: np.broadcast_to(np.asarray(given), len(seeds)),
        (np.asarray(seeds, np.int32), jax.tree.map(np.float32, lambda_w)),
    )
    if not programs.seeds:
        numbers, strengths = jax.tree.map(lambda values: values[0], (numbers, strengths))
    variables = programs.init(numbers)
    train = programs.begin(variables, numbers, strengths)
    return RunState(train, programs.remember(train, programs.masks(train.params)))


def evaluate(
    job: Job,
    programs: Programs,
    state: TrainState,
    placement: Placement = HERE,
) -> dict[str, np.ndarray]:
    """Evaluates the sparse parameters: means over the test examples, scores of predictions.

    Returns:
      Metric -> one entry a seed.
    """
    forward = programs.forward(state)
    seeds = np.size(state.step)
    sums: dict[str, np.ndarray] = {}
    predictions = []
    for batch in job.task.read_test(placement.rows_of):
        # All seeds are evaluated on the same examples.
        placed = placement.put(stack([batch] * seeds) if programs.seeds else batch)
        for name, value in programs.evaluate(forward, state.collections, placed).items():
            # Summed in float64 on the host: float32 counts exactly only up to 2**24.
            sums[name] = sums.get(name, 0) + np.atleast_1d(jax.device_get(value)).astype(float)
        if programs.predict is not None:
            predicted = jax.device_get(programs.predict(forward, state.collections, placed))
            predictions.append(predicted if programs.seeds else one_seed(predicted))
    count = sums.pop("count")
    means = {name: value / count for name, value in sums.items()}
    return means | _scores(job.task, predictions, seeds)


def _scores(task: Task, predictions: list[Any], seeds: int) -> dict[str, np.ndarray]:
    """The task's scores of its predictions, seed by seed."""
    if task.score is None:
        return {}
    found = []
    for seed in range(seeds):
        # `seed=seed` binds the value of this round.
        own = jax.tree.map(lambda values, seed=seed: values[seed], predictions)
        found.append(task.score([batch for batch, _ in own], [made for _, made in own]))
    return {name: np.array([scores[name] for scores in found]) for name in found[0]}


def _train_epoch(
    job: Job,
    programs: Programs,
    state: RunState,
    epoch: int,
    first: int,
    batches: Iterator[Any],
    watch_every: int,
    on_step: Callable[[int, RunState], None],
) -> RunState:
    """Runs an epoch from step `first` on; counts the mask flips of every `watch_every`-th step."""
    run, topology = state
    steps = job.task.steps_per_epoch
    every = min(watch_every, steps)
    refresh_every = steps if job.method.refresh_every is None else job.method.refresh_every
    index = first - 1
    for index, batch in enumerate(batches, first):
        if index == steps:
            break
        done = epoch * steps + index
        # Before the refresh, in which the method chooses its masks.
        if programs.rearrange is not None and done == job.method.rearranges_at:
            run, topology = programs.rearrange(RunState(run, topology))
        # A step of a method that refreshes at each one does so itself.
        if job.method.refresh_every != 1 and done % refresh_every == 0:
            run = programs.refresh(run)
        # Masks before and after a step cost more than the step, so most steps are not watched.
        # The last step of each stretch, so a stretch as long as the epoch is watched once.
        is_watched = index % every == every - 1
        before = programs.masks(run.params) if is_watched else None
        run = programs.step(run, batch)
        if is_watched:
            topology = programs.count_flips(topology, before, programs.masks(run.params))
        on_step(done + 1, RunState(run, topology))
    if index + 1 != steps:
        # The schedules and the mean loss count on it.
        found = "more" if index == steps else index + 1
        raise ValueError(
            f"task {job.task.name} says steps_per_epoch={steps}, but epoch {epoch + 1} has "
            f"{found} batches: correct the task"
        )
    return RunState(run, topology)


def _batches(
    job: Job, seeds: Sequence[int], epoch: int, first_step: int, rows: Rows
) -> Iterator[Batch]:
    streams = [job.task.read(seed, epoch, first_step, rows) for seed in seeds]
    # A single seed has no leading axis anywhere.
    if len(streams) == 1:
        return streams[0]
    return map(stack, zip(*streams, strict=True))
