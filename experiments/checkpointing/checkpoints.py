"""Training states on disk, through orbax: written in the background, read onto any mesh."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from experiments.checkpointing.reading import (
    DamagedError,
    UnreadableError,
    first_line,
    read_alone,
    read_score,
    signed,
    unsigned,
    unused,
)
from experiments.checkpointing.stored_state import checksums, from_stored, split_alike, to_stored
from experiments.distributed.barriers import client, shared_barrier
from experiments.distributed.placement import HERE, Placement
from experiments.distributed.processes import is_first, together
from experiments.distributed.stopping import noted
from experiments.json_files import differences
from nmjax.trees.leaves import named_leaves

# Most severe first, as for `together`: only a damaged checkpoint is skipped.
_FAILURES = (UnreadableError, ValueError, DamagedError)


class Checkpoints:
    """States of one run, by the number of optimizer steps done.

    A checkpoint appears when it is complete, so a killed run leaves the earlier ones whole. Every
    process of a run calls the same methods.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        keep_best: int = 0,
        about: Mapping[str, Any] | None = None,
        placement: Placement = HERE,
    ) -> None:
        """Opens the folder, or creates it; removes what a killed run left half written.

        Args:
          folder: has one folder for each checkpoint.
          keep: how many of the newest to keep.
          keep_best: how many of those with the highest scores to keep as well.
          about: nested dicts that a checkpoint must agree with to be read, such as the plan.
          placement: of states that are read.
        """
        self.folder = folder.absolute()
        self._about = dict(about or {})
        self._placement = placement
        together(self._put_scores_aside)
        score, newest = itemgetter("score"), policies.LatestN(n=keep)
        best = policies.BestN(
            get_metric_fn=score, n=keep_best, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=score if keep_best else None,  # Without it, no scores are written.
                preservation_policy=policies.AnyPreservationPolicy([newest, best]),
                cleanup_tmp_directories=True,
                single_host_load_and_broadcast=True,  # All processes see the same checkpoints.
                async_options=_async_options(),
            ),
            item_names=("state", "about"),
        )
        self._to_stored: Callable[[Any], Any] | None = None

    def latest(self) -> int | None:
        """Returns the steps of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, steps: int, state: Any, *, score: float = -math.inf) -> None:
        """Copies a state, for the next step to reuse its memory, and writes it in the background.

        Waits for the checkpoint before. Old checkpoints go when this one is written.

        Args:
          steps: done so far; not those of another checkpoint.
          state: a pytree of arrays.
          score: for `keep_best`.

        Raises:
          OSError: this or the checkpoint before cannot be written; the earlier ones are whole.
        """
        if self._to_stored is None:
            self._to_stored = self._jit(to_stored, self._place_stored(state))
        stored = self._to_stored(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(stored),
            about=ocp.args.JsonSave(signed(self._about_state(stored["state"]))),
        )
        # When Ctrl-C interrupts a save, orbax may raise something else instead.
        with noted(signal.SIGINT) as pressed, self._naming_what_is_left():
            self._manager.save(steps, args=items, metrics={"score": score})
        if pressed:
            signal.raise_signal(signal.SIGINT)

    def wait(self) -> None:
        """Returns when everything is written; raises what `save` raises."""
        with self._naming_what_is_left():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, as `wait` does, and releases the folder."""
        with self._naming_what_is_left():
            self._manager.close()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Reads the newest checkpoint that is whole, and renames newer ones as damaged.

        Nothing is renamed until one has been read: if none can be read, the cause may be elsewhere.

        Args:
          like: a tree of shapes and dtypes of the state.

        Returns:
          Steps done and the state, placed; None if there is no checkpoint.

        Raises:
          ValueError: what is stored belongs to another model, plan or pattern, or there are
            checkpoints and none is whole.
          OSError: this machine lacks memory, files or permission to read it, or a damaged one
            cannot be renamed.
        """
        damaged: dict[int, str] = {}
        for steps in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._read(steps, like)
            except DamagedError as error:
                damaged[steps] = str(error)  # The error itself holds arrays.
                continue
            for newer, cause in damaged.items():
                self._put_aside(newer, cause)
            return steps, state
        if damaged:
            steps, cause = next(iter(damaged.items()))
            raise ValueError(
                f"no checkpoint in {self.folder} is whole; that of {steps} steps: {cause}. All "
                "stay as they are; move the run's folder away to start over"
            )
        return None

    def _read(self, steps: int, like: Any) -> Any:
        path = self.folder / str(steps)
        target = self._place_stored(like)
        # A process reads only its shards, so one may fail where another does not.
        stored = together(partial(self._read_shards, path, target), _FAILURES)
        sums = self._jit(checksums, target["checksums"])(stored["state"])
        together(partial(_check, list(named_leaves(like)), sums, stored["checksums"]), _FAILURES)
        unpack = self._jit(partial(from_stored, like=like), self._placement.like(like))
        return unpack(stored["state"])

    def _read_shards(self, path: Path, target: Any) -> Any:
        about = unsigned(
            read_alone(path / "about", ocp.JsonCheckpointHandler, ocp.args.JsonRestore())
        )
        if different := differences(about, self._about_state(target["state"])):
            raise ValueError(
                f"the checkpoint {path} does not fit this run: {different}. Give the flags it was "
                "made with, or another --name"
            )
        if self._placement.layout is None:
            # Without NumPy arrays, orbax places arrays on the devices they were written from.
            target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), target)
        restore = ocp.args.StandardRestore(target)
        return read_alone(path / "state", ocp.StandardCheckpointHandler, restore)

    def _about_state(self, packed: Any) -> dict[str, Any]:
        leaves = named_leaves(packed)
        shapes = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}
        return {**self._about, "leaves": shapes}

    def _place_stored(self, state: Any) -> Any:
        """Returns shapes and shardings of a state's stored form."""
        bare = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        shapes = jax.eval_shape(to_stored, bare)
        if self._placement.layout is None:
            return shapes
        placed = jax.tree.map(split_alike, shapes["state"], self._placement.like(bare))
        return {**self._placement.like(shapes), "state": placed}

    def _jit(self, function: Callable[[Any], Any], result: Any) -> Callable[[Any], Any]:
        """Jits a function of states that are placed already; `result` has its shardings."""
        layout = self._placement.layout
        if layout is None:
            return jax.jit(function)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, result)
        if layout.is_explicit:
            # Packing bits crosses shards whose size is not a multiple of eight.
            function = jax.sharding.auto_axes(function, out_sharding=shardings)
        return jax.jit(function, out_shardings=shardings)

    def _put_scores_aside(self) -> None:
        """Renames damaged scores, which orbax reads when it opens the folder."""
        for scores in self.folder.glob("*/metrics") if is_first() else ():
            try:
                read_score(scores / "metrics")
            except DamagedError as error:
                aside = unused(self.folder / f"damaged-metrics-{scores.parent.name}")
                scores.rename(aside)
                print(
                    f"warning: the score of the checkpoint {scores.parent} is damaged: {error}; it "
                    f"is now {aside.name}, and the state is used without it",
                    file=sys.stderr,
                )

    def _put_aside(self, steps: int, cause: str) -> None:
        def rename() -> None:
            if not is_first():
                return
            path, aside = self.folder / str(steps), unused(self.folder / f"damaged-{steps}")
            path.rename(aside)
            print(
                f"warning: the checkpoint {path} is damaged: {cause}; it is now {aside.name}, and "
                "the one before is used",
                file=sys.stderr,
            )

        together(rename)
        self._manager.reload()

    @contextmanager
    def _naming_what_is_left(self) -> Iterator[None]:
        """Adds to an error of writing what the folder still holds."""
        try:
            yield
        except Exception as error:
            whole = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
            raise OSError(
                f"a checkpoint could not be written to {self.folder}: {first_line(error)}. Those "
                f"of steps {', '.join(map(str, whole)) or 'none'} are whole; make room, then "
                "continue with --resume"
            ) from error


def _async_options() -> ocp.AsyncOptions | None:
    if (connection := client()) is None:
        return None
    # A folder that one process fails to create in the background would keep the others waiting.
    return ocp.AsyncOptions(
        barrier_sync_fn=shared_barrier(connection, jax.process_index()),
        create_directories_asynchronously=False,
    )


def _check(names: list[str], sums: jax.Array, expected: Any) -> None:
    wrong = np.flatnonzero(jax.device_get(sums) != jax.device_get(expected))
    if wrong.size:
        raise DamagedError(f"{names[wrong[0]]} is not what was written")
