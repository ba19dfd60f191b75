"""One training run kept on disk: its settings, a line for each epoch, its last states.

`python -m experiments.train` ends up here.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial

import jax

from experiments.checkpointing.checkpoints import Checkpoints
from experiments.checkpointing.reading import unused
from experiments.checkpointing.run_folder import open_folder
from experiments.distributed.processes import is_first, together
from experiments.distributed.stopping import INTERRUPTED, preemption
from experiments.json_files import JsonLines
from experiments.tasks.task import Task
from experiments.training.finite import check_finite
from experiments.training.flags import Flags, make_job, make_run_placement, place_job, strength
from experiments.training.loop import EpochReport, begin, train
from experiments.training.packing import check_packed, write_packed
from experiments.training.results import epoch_numbers
from experiments.training.run_lines import epoch_line, opening, progress_line
from experiments.training.settings import check_alike, deciding, settings_of
from experiments.training.step import RunState, make_programs

COMPLETE, PREEMPTED = 0, 143


class _Preempted(Exception):  # noqa: N818  # not an error
    """The run was told to stop, and its state is saved."""


class Run:
    """A run in its folder, new or as an earlier process left it.

    Attributes:
      state: to continue from, `steps_done` optimizer steps after the start; the last one after
        `finish`.
      release: releases the folder.
    """

    def __init__(self, flags: Flags) -> None:
        """Makes what the flags describe, takes the folder, reads the newest checkpoint.

        Raises:
          MissingDatasetError: the data set has not been prepared.
          ValueError: a flag has an unsupported value, or the folder is in use or holds another
            run; with several processes, if one has other flags or data, or does not see the
            folder. An error in one process ends all.
        """
        self.flags = flags
        together(partial(check_packed, flags))
        self.job = job = together(partial(make_job, flags))
        self.lambda_w = strength(flags, job.task.recipe)
        self.placement = placement = together(partial(make_run_placement, flags, job))
        settings = settings_of(flags, job)
        check_alike(settings, job.task.steps_per_epoch)
        self.release = open_folder(
            flags.folder,
            settings,
            earlier="resume" if flags.resume else "refuse",
            deciding=deciding,
            texts={"plan.txt": job.plan, "layout.txt": placement.layout or "one device"},
        )
        try:
            self.checkpoints = self._open_checkpoints()
            over_seeds, layout = placement
            placed = place_job(flags, job, placement)
            self.programs = make_programs(placed, over_seeds=over_seeds, layout=layout)
            new = partial(begin, self.programs, flags.seeds, self.lambda_w)
            self.state: RunState
            with placement.active():
                found = self.checkpoints.restore(jax.eval_shape(new))
                self.steps_done, self.state = found or (0, new())
        except BaseException:
            self.release()
            raise

    def _open_checkpoints(self) -> Checkpoints:
        flags = self.flags
        return Checkpoints(
            flags.folder / "checkpoints",
            keep=flags.keep_checkpoints,
            keep_best=flags.keep_best,
            about={
                "task": flags.task,
                "model": flags.model_name,
                "method": flags.method,
                "pattern of": {name: str(leaf.pattern) for name, leaf in self.job.plan.items()},
            },
            placement=self.placement,
        )

    def finish(self) -> int:
        """Trains what is left, printing and keeping a line for each epoch.

        Returns:
          `COMPLETE`, `INTERRUPTED` by Ctrl-C, or `PREEMPTED` by SIGTERM.

        Raises:
          FloatingPointError: the loss or a variable is not finite.
          ValueError: the weights are not sparse enough for `--packed`.
          OSError: a checkpoint, a line or the packed file cannot be written.
        """
        flags = self.flags
        _say(opening(flags, self.job, self.lambda_w, self.steps_done))
        status = COMPLETE
        try:
            with closing(self.checkpoints), preemption() as is_told, self.placement.active():
                self._train(is_told)
                if flags.packed is not None:
                    self.checkpoints.wait()
                    write_packed(flags.packed, self.job, self.state.train)
        except KeyboardInterrupt:
            status = INTERRUPTED
        except _Preempted:
            status = PREEMPTED
        finally:
            self.release()
        if status != COMPLETE:
            epochs, steps = divmod(self.checkpoints.latest() or 0, self.job.task.steps_per_epoch)
            within = f", step {steps}" if steps else ""
            _say(f"\nstopped; --resume continues from epoch {epochs}{within}")
        return status

    def _train(self, is_told: Callable[[int], bool]) -> None:
        flags, task, save = self.flags, self.job.task, self.checkpoints.save
        per_epoch, epochs = task.steps_per_epoch, task.recipe.epochs
        log = JsonLines(flags.folder / "metrics.jsonl")
        together(partial(self._keep_lines, log, self.steps_done // per_epoch))
        must_stop = False

        def on_step(steps: int, state: RunState) -> None:
            nonlocal must_stop
            must_stop = is_told(steps)
            if steps % per_epoch == 0:
                return  # The epoch is closed first.
            if flags.log_every and steps % per_epoch % flags.log_every == 0:
                # This waits for the device, which also keeps batches from piling up there.
                _say(progress_line(task, steps, state, steps - counted_from, began))
            if must_stop or (flags.checkpoint_steps and steps % flags.checkpoint_steps == 0):
                # A state that is not finite must not push out a good one.
                check_finite(*self.programs.bad(state.train), state.train, flags.seeds, per_epoch)
                save(steps, state)
            if must_stop:
                raise _Preempted

        reports = train(
            self.job,
            seeds=flags.seeds,
            lambda_w=self.lambda_w,
            programs=self.programs,
            start=self.state,
            evaluate_every=flags.evaluate_every,
            placement=self.placement,
            on_step=on_step,
        )
        began, counted_from = time.perf_counter(), self.steps_done
        for report in reports:
            steps, is_last = report.epoch * per_epoch, report.epoch == epochs
            # The line comes first, so that an epoch with a checkpoint always has its line.
            line = {**epoch_numbers(report), "step": steps, "seconds": report.seconds}
            together(partial(log.append, line) if is_first() else lambda: None)
            if must_stop or is_last or report.epoch % flags.checkpoint_every == 0:
                save(steps, report.state, score=_score(task, report))
            _say(epoch_line(report, epochs))
            if must_stop and not is_last:
                raise _Preempted
            began, counted_from = time.perf_counter(), steps
            self.state = report.state

    def _keep_lines(self, log: JsonLines, epochs: int) -> None:
        """Drops the lines of later epochs, which will be trained again, and damaged lines."""
        if not is_first():
            return
        before = log.path.read_bytes() if log.path.exists() else b""
        if damaged := log.keep("epoch", epochs):
            aside = unused(log.path.with_name("damaged-metrics.jsonl"))
            aside.write_bytes(before)
            print(
                f"warning: {log.path} is damaged in line {', '.join(map(str, damaged))}; it is now "
                f"{aside.name}, and the other lines are kept",
                file=sys.stderr,
            )


def _say(text: str) -> None:
    """Prints for all processes."""
    if is_first():
        print(text, flush=True)


def _score(task: Task, report: EpochReport) -> float:
    """What makes a checkpoint the best: the task's first metric, on the test examples."""
    if not report.test:
        return -math.inf
    metric = task.metrics[0]
    value = metric.sign * float(report.test[metric.name].mean())
    return -math.inf if math.isnan(value) else value
