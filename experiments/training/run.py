"""One training run kept on disk: its settings, a line for each epoch, its last states.

`python -m experiments.train` ends up here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax

from experiments.checkpointing.checkpoints import Checkpoints
from experiments.checkpointing.run_folder import Earlier, open_folder
from experiments.distributed.placement import Placement
from experiments.distributed.processes import REFUSALS, is_first, together
from experiments.distributed.stopping import preemption
from experiments.json_files import JsonLines
from experiments.tasks.task import Task
from experiments.training.flags import Flags, make_job, make_run_placement, strength
from experiments.training.loop import EpochReport, begin, train
from experiments.training.results import epoch_numbers
from experiments.training.run_lines import epoch_line, opening, reached, say, with_progress
from experiments.training.settings import check_alike, deciding, settings_of
from experiments.training.step import Job, Programs, RunState, make_programs

COMPLETE, INTERRUPTED, PREEMPTED = 0, 130, 143


class Preempted(Exception):  # noqa: N818  # not an error
    """The run was told to stop, and its state is saved."""


class Run(NamedTuple):
    """A run that is ready to train.

    Attributes:
      flags: of the command line.
      job: task, plan and method.
      programs: the jitted functions.
      placement: over devices and processes.
      release: releases the folder.
      checkpoints: open.
      steps_done: optimizer steps behind `state`.
      state: to continue from.
    """

    flags: Flags
    job: Job
    programs: Programs
    placement: Placement
    release: Callable[[], None]
    checkpoints: Checkpoints
    steps_done: int
    state: RunState


def open_run(flags: Flags) -> Run:
    """Makes what the flags describe, or finds it as an earlier run left it.

    Raises:
      MissingDatasetError: the data set has not been prepared.
      ValueError: a flag has an unsupported value, or the folder is in use or holds another run;
        with several processes, if one has other flags or data, or does not see the folder. An
        error in one process ends all.
    """
    job, placement = together(partial(_make, flags), REFUSALS)
    settings = settings_of(flags, job)
    check_alike(settings, job.task.steps_per_epoch)
    earlier: Earlier = "resume" if flags.resume else "refuse"
    texts = {"plan.txt": job.plan, "layout.txt": placement.layout or "one device"}
    release = open_folder(flags.folder, settings, earlier=earlier, deciding=deciding, texts=texts)
    try:
        return _open(flags, job, placement, release)
    except BaseException:
        release()
        raise


def _make(flags: Flags) -> tuple[Job, Placement]:
    job = make_job(flags)
    return job, make_run_placement(flags, job)


def _open(flags: Flags, job: Job, placement: Placement, release: Callable[[], None]) -> Run:
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
    return Run(flags, job, programs, placement, release, checkpoints, steps, state)


def finish(run: Run) -> int:
    """Trains what is left, printing and keeping a line for each epoch.

    Returns:
      `COMPLETE`, `INTERRUPTED` by Ctrl-C, or `PREEMPTED` by SIGTERM.

    Raises:
      FloatingPointError: the loss is not finite.
      OSError: a checkpoint or a line cannot be written.
    """
    say(opening(run.flags, run.job, run.steps_done))
    status = COMPLETE
    try:
        with preemption() as is_told, run.placement.active():
            _train(run, is_told)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Preempted:
        status = PREEMPTED
    finally:
        try:
            run.checkpoints.close()
        finally:
            run.release()
    if status != COMPLETE:
        done = reached(run.checkpoints.latest() or 0, run.job.task.steps_per_epoch)
        say(f"\nstopped; --resume continues from {done}")
    return status


def _train(run: Run, is_told: Callable[[int], bool]) -> None:
    flags, recipe, per_epoch = run.flags, run.job.task.recipe, run.job.task.steps_per_epoch
    log = JsonLines(flags.folder / "metrics.jsonl")
    if is_first():
        # Later epochs will be trained again.
        log.keep(lambda line: line["epoch"] <= run.steps_done // per_epoch)
    programs, every = run.programs, flags.log_every
    if every:
        programs = with_progress(programs, run.job.task, every, run.steps_done)
    is_last_step = False

    def on_step(steps: int, state: RunState) -> None:
        nonlocal is_last_step
        is_last_step = is_told(steps)
        if steps % per_epoch == 0:
            return  # The epoch is closed first.
        if is_last_step or (flags.checkpoint_steps and steps % flags.checkpoint_steps == 0):
            run.checkpoints.save(steps, state)
        if is_last_step:
            raise Preempted

    reports = train(
        run.job,
        seeds=flags.seeds,
        lambda_w=strength(flags, recipe),
        programs=programs,
        start=run.state,
        evaluate_every=flags.evaluate_every,
        placement=run.placement,
        on_step=on_step,
    )
    for report in reports:
        steps, is_last = report.epoch * per_epoch, report.epoch == recipe.epochs
        # The line comes first, so that an epoch with a checkpoint always has its line.
        if is_first():
            log.append({**epoch_numbers(report), "step": steps, "seconds": report.seconds})
        if is_last_step or is_last or report.epoch % flags.checkpoint_every == 0:
            run.checkpoints.save(steps, report.state, score=_score(run.job.task, report))
        say(epoch_line(report, recipe.epochs))
        if is_last_step and not is_last:
            raise Preempted


def _score(task: Task, report: EpochReport) -> float:
    """What makes a checkpoint the best: the task's first metric, on the test examples."""
    if not report.test:
        return -math.inf
    metric = task.metrics[0]
    value = metric.sign * float(report.test[metric.name].mean())
    return -math.inf if math.isnan(value) else value
