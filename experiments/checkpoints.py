"""Training states on disk, through orbax."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """The last few states of one run, by epoch.

    A checkpoint appears when it is complete or not at all, so that a killed run leaves the
    earlier ones whole. One process writes; a run over several hosts is not supported.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        """Opens the folder, making it if needed.

        Args:
          folder: of the checkpoints, one sub-folder an epoch.
          keep: how many to keep.
        """
        self._folder = folder.absolute()
        # Written before `save` returns: the next training step reuses the memory of the state.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The epochs behind the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, epoch: int, state: Any) -> None:
        """Writes a state, a pytree of arrays, and drops the oldest beyond those to keep.

        Ctrl-C waits until that is done.
        """
        with _interrupt_afterwards():
            self._manager.save(epoch, args=ocp.args.StandardSave(jax.device_get(state)))

    def restore(self, epoch: int, make_state: Callable[[], Any]) -> Any:
        """Reads the state of an epoch.

        Args:
          epoch: of a checkpoint that is there, such as `latest()`.
          make_state: makes a state of the same structure; is only traced.

        Returns:
          The state, on the default device.

        Raises:
          ValueError: if what is stored is of another structure or of other shapes.
        """
        like = jax.eval_shape(make_state)
        hollow = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        try:
            stored = self._manager.restore(epoch, args=ocp.args.StandardRestore(hollow))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"the checkpoint {self._folder / str(epoch)} does not fit this run: {error}"
            ) from error
        for (path, leaf), expected in zip(
            jax.tree.leaves_with_path(stored), jax.tree.leaves(like), strict=True
        ):
            if (leaf.shape, leaf.dtype) != (expected.shape, expected.dtype):
                raise ValueError(
                    f"the checkpoint {self._folder / str(epoch)} does not fit this run: "
                    f"{jax.tree_util.keystr(path)} is {leaf.dtype}{leaf.shape}, "
                    f"expected {expected.dtype}{expected.shape}"
                )
        return jax.tree.map(jnp.asarray, stored)

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()


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
