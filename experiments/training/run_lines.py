"""The lines that a run prints."""

from __future__ import annotations

import time

import jax

from experiments.tasks.task import Task
from experiments.training.flags import Flags
from experiments.training.loop import EpochReport
from experiments.training.step import Job, RunState


def opening(flags: Flags, job: Job, lambda_w: float, steps_done: int) -> str:
    """Says what will be trained, and how much of it is done."""
    weights = sum(leaf.weights for leaf in job.plan.values())
    kept = sum(leaf.kept for leaf in job.plan.values())
    per_epoch = job.task.steps_per_epoch
    epochs, steps = divmod(steps_done, per_epoch)
    term = f", lambda_w {lambda_w:.3g}" if lambda_w else ""
    rest = f" and {steps} steps" if steps else ""
    return (
        f"{flags.task}, {flags.model_name}, {flags.method}{term}: {flags.pattern} keeps {kept:,} "
        f"of {weights:,} weights in {len(job.plan)} leaves\n"
        f"{epochs} of {job.task.recipe.epochs} epochs{rest} done, {per_epoch} steps each; "
        f"output folder: {flags.folder}"
    )


def progress_line(task: Task, steps: int, state: RunState, counted: int, began: float) -> str:
    """Gives the epoch's mean loss so far, and the speed of the last `counted` steps."""
    epoch, within = divmod(steps, task.steps_per_epoch)
    loss = jax.device_get(state.train.loss_sum).mean() / within
    speed = counted * task.recipe.batch_size / (time.perf_counter() - began)
    return (
        f"  epoch {epoch + 1}, step {within}/{task.steps_per_epoch}: loss {loss:.4f}, "
        f"{speed:,.0f} examples/s"
    )


def epoch_line(report: EpochReport, epochs: int) -> str:
    """Sums up an epoch, as means over the seeds."""
    test = "".join(f"  test {name} {values.mean():.4f}" for name, values in report.test.items())
    return (
        f"epoch {report.epoch}/{epochs}  loss {report.train_loss.mean():.4f}{test}"
        f"  SAD {report.sad_epoch.mean():,.0f}  flip rate {report.flip_rate.mean():.2e}"
        f"  density {report.density.mean():.3f}  {report.seconds:.1f} s"
    )
