"""One training run kept on disk: its settings, a line for each epoch, its last states.

`python -m experiments.train` ends up here.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.checkpoints import Checkpoints
from experiments.flags import Flags, make_job, strength
from experiments.loop import EpochReport, begin, train
from experiments.metrics_log import MetricsLog
from experiments.placement import Placement, make_placement
from experiments.settings import claim_folder
from experiments.step import Job, Programs, RunState, TrainState, make_programs


class Run(NamedTuple):
    """A run that is ready to train.

    Attributes:
      flags: of the command line.
      job: task, plan and method.
      programs: the jitted functions.
      placement: over devices.
      checkpoints: open.
      epochs_done: epochs behind `state`.
      state: to go on from.
    """

    flags: Flags
    job: Job
    programs: Programs
    placement: Placement
    checkpoints: Checkpoints
    epochs_done: int
    state: RunState


def open_run(flags: Flags) -> Run:
    """Makes what the flags describe, or finds it as an earlier run left it.

    Raises:
      MissingDatasetError: if the data set has not been prepared.
      ValueError: if a flag asks for what there is not, or the folder holds another run.
    """
    job = make_job(flags)
    recipe = job.task.recipe
    placement = make_placement(flags.devices, len(flags.seeds), recipe.batch_size)
    claim_folder(flags, job)
    programs = make_programs(job, over_seeds=placement.over_seeds)

    def first_state() -> RunState:
        return begin(programs, flags.seeds, strength(flags, recipe))

    checkpoints = Checkpoints(flags.folder / "checkpoints", keep=flags.keep_checkpoints)
    done = checkpoints.latest()
    state = first_state() if done is None else checkpoints.restore(done, first_state)
    return Run(flags, job, programs, placement, checkpoints, done or 0, placement.put_state(state))


def finish(run: Run) -> bool:
    """Trains the epochs that are left, printing and keeping a line for each.

    Returns:
      True if the run is complete, False if Ctrl-C stopped it.

    Raises:
      FloatingPointError: if the loss stops being finite.
    """
    print(_opening(run))
    try:
        _train(run)
    except KeyboardInterrupt:
        print(f"\nstopped; --resume goes on from epoch {run.checkpoints.latest() or 0}")
        return False
    finally:
        run.checkpoints.close()
    return True


def _train(run: Run) -> None:
    flags, recipe, per_epoch = run.flags, run.job.task.recipe, run.job.task.steps_per_epoch
    log = MetricsLog(flags.folder)
    log.keep_until(run.epochs_done)
    reports = train(
        run.job,
        seeds=flags.seeds,
        lambda_w=strength(flags, recipe),
        programs=_telling(run) if flags.log_every else run.programs,
        start=run.state,
        evaluate_every=flags.evaluate_every,
        place=run.placement.put_batch,
    )
    for report in reports:
        # The line comes first: an epoch that has a checkpoint always has its line.
        log.append(report, per_epoch)
        if report.epoch % flags.checkpoint_every == 0 or report.epoch == recipe.epochs:
            run.checkpoints.save(report.epoch, report.state)
        print(_epoch_line(report, recipe.epochs), flush=True)


def _opening(run: Run) -> str:
    flags, job = run.flags, run.job
    weights = sum(leaf.weights for leaf in job.plan.values())
    kept = sum(leaf.kept for leaf in job.plan.values())
    lambda_w = strength(flags, job.task.recipe)
    term = f", lambda_w {lambda_w:.3g}" if lambda_w else ""
    return (
        f"{flags.task}, {flags.model_name}, {flags.method}{term}: {flags.pattern} keeps {kept:,} "
        f"of {weights:,} weights in {len(job.plan)} leaves\n"
        f"{run.epochs_done} of {job.task.recipe.epochs} epochs done, {job.task.steps_per_epoch} "
        f"steps each; everything goes to {flags.folder}"
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
    steps, began = run.epochs_done * task.steps_per_epoch, time.perf_counter()

    def step(state: TrainState, batch: Any) -> TrainState:
        nonlocal steps, began
        if steps % task.steps_per_epoch == 0:
            began = time.perf_counter()
        state = run.programs.step(state, batch)
        epoch, within = divmod(steps, task.steps_per_epoch)
        steps, within = steps + 1, within + 1
        if within % every == 0 and within < task.steps_per_epoch:
            loss = np.mean(jax.device_get(state.loss_sum)) / within
            speed = within * task.recipe.batch_size / (time.perf_counter() - began)
            print(
                f"  epoch {epoch + 1}, step {within}/{task.steps_per_epoch}: loss {loss:.4f}, "
                f"{speed:,.0f} examples/s",
                flush=True,
            )
        return state

    return run.programs._replace(step=step)
