"""Training states on disk, through orbax: written in the background, read onto any mesh."""

from __future__ import annotations

import errno
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from experiments.checkpointing.orbax_noise import hold_back
from experiments.checkpointing.stored_state import checksums, from_stored, split_alike, to_stored
from experiments.distributed.placement import HERE, Placement
from experiments.distributed.processes import is_first, tell_all, together
from nmjax.trees.leaves import named_leaves

# What reading takes and this machine does not give, whatever the checkpoint holds.
_LACKING = frozenset(
    [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ESTALE]
)
# How XLA and tensorstore say so.
_SAYS_LACKING = re.compile("RESOURCE_EXHAUSTED|PERMISSION_DENIED")
_SAYS_ERRNO = re.compile(r"os_error_code='(\d+)'")


class DamagedError(Exception):
    """A checkpoint that cannot be read, or is not what was written."""


class UnreadableError(OSError):
    """A checkpoint that cannot be read here and now, though it may be whole."""


# Gravest first, as for `together`.
_FAILURES = (UnreadableError, DamagedError)


class Checkpoints:
    """States of one run, by the number of optimizer steps done.

    A checkpoint appears when it is complete or not at all, so that a killed run leaves the
    earlier ones whole. Every process of a run opens the same folder, and calls the same methods.
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
        """Opens the folder, making it if needed; what a killed run left half written is removed.

        Args:
          folder: of the checkpoints, one sub-folder each.
          keep: how many of the newest to keep.
          keep_best: how many of the highest scores to keep as well.
          about: what a checkpoint must agree in to be read, such as the plan: dicts of text.
          placement: of states that are read.
        """
        self.folder = folder.absolute()
        self._about = dict(about or {})
        self._placement = placement
        hold_back()
        rules: list[policies.PreservationPolicy] = [policies.LatestN(n=keep)]
        if keep_best:
            rules.append(policies.BestN(get_metric_fn=_score, n=keep_best))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=_score if keep_best else None,
                preservation_policy=policies.AnyPreservationPolicy(rules),
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "about"),
        )
        self._to_stored: Callable[[Any], Any] | None = None

    def latest(self) -> int | None:
        """The steps behind the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, steps: int, state: Any, *, score: float = -math.inf) -> None:
        """Begins to write a state, and drops those beyond the ones to keep once it is written.

        Returns when the state has been copied: the next training step may have its memory. Waits
        for the checkpoint before, if that is still being written. Ctrl-C waits for the return.

        Args:
          steps: done, not those of a checkpoint that is there.
          state: a pytree of arrays.
          score: for `keep_best`.

        Raises:
          OSError: this or the checkpoint before could not be written; the earlier ones are whole.
        """
        if self._to_stored is None:
            self._to_stored = self._jit(to_stored, self._place_stored(state))
        stored = self._to_stored(state)
        about = {**self._about, "leaves": _leaves(stored["state"])}
        with _interrupt_afterwards(), self._telling_what_is_left():
            self._manager.save(
                steps,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(stored), about=ocp.args.JsonSave(about)
                ),
                metrics={"score": score},
            )

    def wait(self) -> None:
        """Returns when everything is written; raises what `save` raises."""
        with self._telling_what_is_left():
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Reads the newest checkpoint that is whole; says which ones are not, and puts them aside.

        Nothing is put aside before one was read: what none can be read for may not be damage.

        Args:
          like: a tree of shapes and dtypes of the state.

        Returns:
          Steps done and the state, placed; None if no checkpoint is there.

        Raises:
          ValueError: if what is stored is of another model, plan or pattern, or if there are
            checkpoints and none is whole.
          OSError: if this machine lacks what reading takes, such as memory, files or permission;
            or one that is damaged cannot be put aside.
        """
        failed: dict[int, str] = {}
        for steps in self._newest_first():
            try:
                state = self._read(steps, like)
            except DamagedError as error:
                failed[steps] = str(error)  # The error itself holds arrays.
                continue
            for damaged, cause in failed.items():
                self._put_aside(damaged, cause)
            return steps, state
        if failed:
            steps, cause = next(iter(failed.items()))
            raise ValueError(
                f"no checkpoint in {self.folder} is whole; that of {steps} steps: {cause}. All are "
                "left as they are; move the run's folder away to begin anew"
            )
        return None

    def close(self) -> None:
        """Waits, as `wait` does, and releases the folder."""
        with self._telling_what_is_left():
            self._manager.close()

    def _newest_first(self) -> Iterator[int]:
        """The checkpoints that any process sees."""
        own = sorted(self._manager.all_steps(), reverse=True)
        while seen := [int(text) for text in tell_all(str(own[0]) if own else "") if text]:
            yield max(seen)
            own = [steps for steps in own if steps < max(seen)]

    def _read(self, steps: int, like: Any) -> Any:
        path = self.folder / str(steps)
        read_about = partial(
            _read, path / "about", ocp.JsonCheckpointHandler, ocp.args.JsonRestore()
        )
        about = together(read_about, _FAILURES)
        target = self._place_stored(like)
        expected = {**self._about, "leaves": _leaves(target["state"])}
        differences = list(_differences(about, expected))
        if differences:
            raise ValueError(
                f"the checkpoint {path} does not fit this run: {'; '.join(differences[:4])}. Give "
                "the flags it was made with, or another --name"
            )
        hollow = target
        if self._placement.layout is None:
            # NumPy's arrays: any others go to the devices they were written from.
            hollow = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), target)
        restore = ocp.args.StandardRestore(hollow)
        # A process reads its shards only, so that one may fail where another does not.
        read_state = partial(_read, path / "state", ocp.StandardCheckpointHandler, restore)
        stored = together(read_state, _FAILURES)
        with _lack_is_no_damage(path):
            sums = self._jit(checksums, target["checksums"])(stored["state"])
            check = partial(_check, list(named_leaves(like)), sums, stored["checksums"])
            together(check, _FAILURES)
            unpack = self._jit(partial(from_stored, like=like), self._placement.like(like))
            return unpack(stored["state"])

    def _place_stored(self, state: Any) -> Any:
        """Shapes and shardings of a state's stored form: packed masks are split as masks are."""
        bare = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        shapes = jax.eval_shape(to_stored, bare)
        if self._placement.layout is None:
            return shapes
        placed = jax.tree.map(split_alike, shapes["state"], self._placement.like(bare))
        return {**self._placement.like(shapes), "state": placed}

    def _jit(self, function: Callable[[Any], Any], result: Any) -> Callable[[Any], Any]:
        """Jits a function for states that lie as the placement says, with a result of shapes."""
        layout, shardings = self._placement.layout, jax.tree.map(lambda x: x.sharding, result)
        if layout is None:
            return jax.jit(function)
        if layout.is_explicit:
            # Bits are packed across shards where those hold no multiple of eight.
            function = jax.sharding.auto_axes(function, out_sharding=shardings)
        return jax.jit(function, out_shardings=shardings)

    def _put_aside(self, steps: int, cause: str) -> None:
        path = self.folder / str(steps)
        name = together(partial(_rename_damaged, path), (OSError,))
        self._manager.reload()
        if is_first():
            print(
                f"warning: the checkpoint {path} is damaged: {cause}; it is now {name}, and the "
                "one before is used",
                file=sys.stderr,
            )

    @contextmanager
    def _telling_what_is_left(self) -> Iterator[None]:
        """Adds to an error of writing what the folder still holds."""
        try:
            yield
        except Exception as error:
            whole = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
            raise OSError(
                f"a checkpoint could not be written to {self.folder}: {_first_line(error)}. Those "
                f"of steps {', '.join(map(str, whole)) or 'none'} are whole; make room, then go on "
                "with --resume"
            ) from error


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _read(path: Path, handler: Callable[[], ocp.CheckpointHandler], args: Any) -> Any:
    """Reads a folder of a checkpoint; what goes wrong means that it is damaged, or a lack."""
    process = jax.process_index()
    # In this process alone: where readers wait for each other, one that fails leaves the rest.
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    try:
        with (
            _lack_is_no_damage(path.parent),
            ocp.Checkpointer(handler(), multiprocessing_options=alone) as reader,
        ):
            return reader.restore(path, args=args)
    except UnreadableError:
        raise
    except Exception as error:  # Orbax and tensorstore raise many kinds.
        raise DamagedError(_first_line(error)) from error


@contextmanager
def _lack_is_no_damage(path: Path) -> Iterator[None]:
    """Raises UnreadableError where reading a checkpoint fails for what the machine lacks."""
    try:
        yield
    except Exception as error:
        if isinstance(error, _FAILURES) or not _is_lack(error):
            raise
        raise UnreadableError(
            f"the checkpoint {path} cannot be read here: {_first_line(error)}. It may be whole and "
            "stays as it is; give the run what it lacks, then go on with --resume"
        ) from error


def _is_lack(error: BaseException | None) -> bool:
    """Whether the machine, and not the checkpoint, is a cause of an error."""
    if error is None:
        return False
    codes = {int(code) for code in _SAYS_ERRNO.findall(str(error))}
    if isinstance(error, OSError) and error.errno is not None:
        codes.add(error.errno)
    return (
        isinstance(error, MemoryError | PermissionError)
        or bool(codes & _LACKING)
        or _SAYS_LACKING.search(str(error)) is not None
        or _is_lack(error.__cause__ or error.__context__)
    )


def _rename_damaged(path: Path) -> str:
    """Renames a checkpoint, in the first process only; returns its name there."""
    name, number = f"damaged-{path.name}", 0
    while path.with_name(name).exists():
        number += 1
        name = f"damaged-{path.name}-{number}"
    if is_first():
        path.rename(path.with_name(name))
    return name


def _check(names: Sequence[str], sums: jax.Array, expected: Any) -> None:
    """Raises DamagedError if checksums are not those that were written."""
    wrong = np.flatnonzero(jax.device_get(sums) != jax.device_get(expected))
    if wrong.size:
        raise DamagedError(f"{names[wrong[0]]} is not what was written")


def _leaves(state: Any) -> dict[str, str]:
    """Shape and dtype of every array, as text."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named_leaves(state).items()}


def _differences(stored: Any, expected: Any, name: str = "") -> Iterator[str]:
    """What two nested dicts of text differ in."""
    if not isinstance(stored, dict) or not isinstance(expected, dict):
        if stored != expected:
            yield f"{name} is {stored or 'not there'}, expected {expected or 'nothing'}"
        return
    for key in dict.fromkeys([*expected, *stored]):
        yield from _differences(
            stored.get(key), expected.get(key), f"{name} {key}" if name else str(key)
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Holds Ctrl-C back: orbax does not survive it in the middle of a save."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
