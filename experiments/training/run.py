"""One training run kept on disk: its settings, a line for each epoch, its last states.

`python -m experiments.train` ends up here.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.checkpointing.checkpoints import Checkpoints
from experiments.checkpointing.folder_lock import FolderLock, check_held
from experiments.distributed.placement import Placement
from experiments.distributed.processes import is_first, tell_all, together
from experiments.tasks.task import Task
from experiments.training.flags import Flags, make_job, make_run_placement, strength
from experiments.training.loop import EpochReport, begin, train
from experiments.training.metrics_log import MetricsLog
from experiments.training.settings import check_alike, check_same_task, claim_folder
from experiments.training.step import Job, Programs, RunState, TrainState, make_programs
from experiments.training.stopping import Preempted, Preemption

COMPLETE, INTERRUPTED, PREEMPTED = 0, 130, 143

# What a run that cannot begin raises.
_REFUSALS = (ValueError, OSError)


class Run(NamedTuple):
    """A run that is ready to train.

    Attributes:
      flags: of the command line.
      job: task, plan and method.
      programs: the jitted functions.
      placement: over devices and processes.
      lock: on the run's folder; None in all processes but the first.
      checkpoints: open.
      steps_done: optimizer steps behind `state`.
      state: to go on from.
    """

    flags: Flags
    job: Job
    programs: Programs
    placement: Placement
    lock: FolderLock | None
    checkpoints: Checkpoints
    steps_done: int
    state: RunState


def open_run(flags: Flags) -> Run:
    """Makes what the flags describe, or finds it as an earlier run left it.

    Raises:
      MissingDatasetError: if the data set has not been prepared.
      ValueError: if a flag asks for what there is not, or the folder is in use or holds another
        run; of several processes, if one was given other flags, has other data or does not see
        the folder. What one cannot do ends all.
    """
    check_alike(flags)
    job, placement = together(partial(_make, flags), _REFUSALS)
    check_same_task(job.task)
    lock = together(partial(_claim, flags, job, placement), _REFUSALS)
    try:
        return _open(flags, job, placement, lock)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _make(flags: Flags) -> tuple[Job, Placement]:
    job = make_job(flags)
    return job, make_run_placement(flags, job)


def _claim(flags: Flags, job: Job, placement: Placement) -> FolderLock | None:
    if not is_first():
        return None
    lock = FolderLock(flags.folder)
    try:
        claim_folder(flags, job, placement)
    except BaseException:
        lock.release()
        raise
    return lock


def _open(flags: Flags, job: Job, placement: Placement, lock: FolderLock | None) -> Run:
    owner = tell_all("" if lock is None else lock.owner)[0]
    together(partial(check_held, flags.folder, owner), _REFUSALS)
    programs = make_programs(job, over_seeds=placement.over_seeds, layout=placement.layout)
    checkpoints = Checkpoints(
        flags.folder / "checkpoints",
        keep=flags.keep_checkpoints,
        keep_best=flags.keep_best,
        about={
            "task": flags.task,
            "model": flags.model_name,
            "method": flags.method,
            "pattern of": {name: str(leaf.pattern) for name, leaf in job.plan.items()},
        },
        placement=placement,
    )
    first_state = partial(begin, programs, flags.seeds, strength(flags, job.task.recipe))
    with placement.active():
        found = checkpoints.restore(jax.eval_shape(first_state))
        steps, state = (0, first_state()) if found is None else found
    return Run(flags, job, programs, placement, lock, checkpoints, steps, state)


def finish(run: Run) -> int:
    """Trains what is left, printing and keeping a line for each epoch.

    Returns:
      `COMPLETE`, `INTERRUPTED` by Ctrl-C, or `PREEMPTED` by SIGTERM.

    Raises:
      FloatingPointError: if the loss stops being finite.
      OSError: if a checkpoint or a line cannot be written.
    """
    _say(_opening(run))
    status = COMPLETE
    try:
        with Preemption() as preemption, run.placement.active():
            _train(run, preemption)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Preempted:
        status = PREEMPTED
    finally:
        try:
            run.checkpoints.close()
        finally:
            if run.lock is not None:
                run.lock.release()
    if status != COMPLETE:
        epochs = _epochs(run.checkpoints.latest() or 0, run.job.task.steps_per_epoch)
        _say(f"\nstopped; --resume goes on from {epochs}")
    return status


def _train(run: Run, preemption: Preemption) -> None:
    flags, recipe, per_epoch = run.flags, run.job.task.recipe, run.job.task.steps_per_epoch
    log = MetricsLog(flags.folder)
    if is_first():
        log.keep_until(run.steps_done // per_epoch)
    is_asked = False

    def on_step(steps: int, state: RunState) -> None:
        nonlocal is_asked
        is_asked = preemption.asked(steps)
        if steps % per_epoch == 0:
            return  # The epoch is closed first.
        if is_asked or (flags.checkpoint_steps and steps % flags.checkpoint_steps == 0):
            run.checkpoints.save(steps, state)
        if is_asked:
            raise Preempted

    reports = train(
        run.job,
        seeds=flags.seeds,
        lambda_w=strength(flags, recipe),
        programs=_telling(run) if flags.log_every else run.programs,
        start=run.state,
        evaluate_every=flags.evaluate_every,
        placement=run.placement,
        on_step=on_step,
    )
    for report in reports:
        # The line comes first: an epoch that has a checkpoint always has its line.
        if is_first():
            log.append(report, per_epoch)
        is_last = report.epoch == recipe.epochs
        if is_asked or is_last or report.epoch % flags.checkpoint_every == 0:
            run.checkpoints.save(
                report.epoch * per_epoch, report.state, score=_score(run.job.task, report)
            )
        _say(_epoch_line(report, recipe.epochs))
        if is_asked and not is_last:
            raise Preempted


def _score(task: Task, report: EpochReport) -> float:
    """What makes a checkpoint the best: the task's first metric, on the test examples."""
    if not report.test:
        return -math.inf
    metric = task.metrics[0]
    value = metric.sign * float(report.test[metric.name].mean())
    return -math.inf if math.isnan(value) else value


def _say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def _epochs(steps: int, per_epoch: int) -> str:
    epochs, rest = divmod(steps, per_epoch)
    return f"epoch {epochs}" + (f", step {rest}" if rest else "")


def _opening(run: Run) -> str:
    flags, job = run.flags, run.job
    weights = sum(leaf.weights for leaf in job.plan.values())
    kept = sum(leaf.kept for leaf in job.plan.values())
    lambda_w = strength(flags, job.task.recipe)
    term = f", lambda_w {lambda_w:.3g}" if lambda_w else ""
    epochs, steps = divmod(run.steps_done, job.task.steps_per_epoch)
    rest = f" and {steps} steps" if steps else ""
    return (
        f"{flags.task}, {flags.model_name}, {flags.method}{term}: {flags.pattern} keeps {kept:,} "
        f"of {weights:,} weights in {len(job.plan)} leaves\n"
        f"{epochs} of {job.task.recipe.epochs} epochs{rest} done, {job.task.steps_per_epoch} steps "
        f"each; everything goes to {flags.folder}"
    )


def _epoch_line(report: EpochReport, epochs: int) -> str:
    test = "".join(f"  test {name} {values.mean():.4f}" for name, values in report.test.items())
    return (
        f"epoch {report.epoch}/{epochs}  loss {report.train_loss.mean():.4f}{test}"
        f"  SAD {report.sad_epoch.mean():,.0f}  flip rate {report.flip_rate.mean():.2e}"
        f"  density {report.density.mean():.3f}  {report.seconds:.1f} s"
    )


def _telling(run: Run) -> Programs:
    """The programs, with a step that prints the epoch's mean loss and speed every few steps.

    To know them it waits for the device, which also keeps batches from piling up there.
    """
    task, every = run.job.task, run.flags.log_every
    steps, began, counted = run.steps_done, time.perf_counter(), 0

    def step(state: TrainState, batch: Any) -> TrainState:
        nonlocal steps, began, counted
        if steps % task.steps_per_epoch == 0:
            began, counted = time.perf_counter(), 0
        state = run.programs.step(state, batch)
        epoch, within = divmod(steps, task.steps_per_epoch)
        steps, within, counted = steps + 1, within + 1, counted + 1
        if within % every == 0 and within < task.steps_per_epoch:
            loss = np.mean(jax.device_get(state.loss_sum)) / within
            speed = counted * task.recipe.batch_size / (time.perf_counter() - began)
            _say(
                f"  epoch {epoch + 1}, step {within}/{task.steps_per_epoch}: loss {loss:.4f}, "
                f"{speed:,.0f} examples/s"
            )
        return state

    return run.programs._replace(step=step)
