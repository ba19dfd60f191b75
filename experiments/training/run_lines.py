"""The lines that a run prints, once for all of its processes."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from experiments.distributed.processes import is_first
from experiments.tasks.task import Task
from experiments.training.flags import Flags, strength
from experiments.training.loop import EpochReport
from experiments.training.step import Job, Programs, TrainState


def say(text: str) -> None:
    """Prints a line, in the first process only."""
    if is_first():
        print(text, flush=True)


def reached(steps: int, per_epoch: int) -> str:
    """Names how far a run has come."""
    epochs, rest = divmod(steps, per_epoch)
    return f"epoch {epochs}" + (f", step {rest}" if rest else "")


def opening(flags: Flags, job: Job, steps_done: int) -> str:
    """Says what will be trained, and how much of it is done."""
    weights = sum(leaf.weights for leaf in job.plan.values())
    kept = sum(leaf.kept for leaf in job.plan.values())
    lambda_w = strength(flags, job.task.recipe)
    term = f", lambda_w {lambda_w:.3g}" if lambda_w else ""
    epochs, steps = divmod(steps_done, job.task.steps_per_epoch)
    rest = f" and {steps} steps" if steps else ""
    return (
        f"{flags.task}, {flags.model_name}, {flags.method}{term}: {flags.pattern} keeps {kept:,} "
        f"of {weights:,} weights in {len(job.plan)} leaves\n"
        f"{epochs} of {job.task.recipe.epochs} epochs{rest} done, {job.task.steps_per_epoch} steps "
        f"each; output folder: {flags.folder}"
    )


def epoch_line(report: EpochReport, epochs: int) -> str:
    """Sums up an epoch, as means over the seeds."""
    test = "".join(f"  test {name} {values.mean():.4f}" for name, values in report.test.items())
    return (
        f"epoch {report.epoch}/{epochs}  loss {report.train_loss.mean():.4f}{test}"
        f"  SAD {report.sad_epoch.mean():,.0f}  flip rate {report.flip_rate.mean():.2e}"
        f"  density {report.density.mean():.3f}  {report.seconds:.1f} s"
    )


def with_progress(programs: Programs, task: Task, every: int, steps_done: int) -> Programs:
    """Returns the programs, with a step that prints mean loss and speed every few steps.

    Printing them waits for the device, which also keeps batches from piling up there.
    """
    steps, began, counted = steps_done, time.perf_counter(), 0

    def step(state: TrainState, batch: Any) -> TrainState:
        nonlocal steps, began, counted
        if steps % task.steps_per_epoch == 0:
            began, counted = time.perf_counter(), 0
        state = programs.step(state, batch)
        epoch, within = divmod(steps, task.steps_per_epoch)
        steps, within, counted = steps + 1, within + 1, counted + 1
        if within % every == 0 and within < task.steps_per_epoch:
            loss = np.mean(jax.device_get(state.loss_sum)) / within
            speed = counted * task.recipe.batch_size / (time.perf_counter() - began)
            say(
                f"  epoch {epoch + 1}, step {within}/{task.steps_per_epoch}: loss {loss:.4f}, "
                f"{speed:,.0f} examples/s"
            )
        return state

    return programs._replace(step=step)
