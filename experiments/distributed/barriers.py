"""Barriers for work in the background, which a process that failed does not leave waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax

# orbax meets here at the end of a save, also where the save failed.
_LAST = "ThreadSaveMultiHostValueHolder"


def client() -> Any:
    """Returns this process's connection to the coordinator; None without `jax.distributed`."""
    from jax._src import distributed  # JAX has no public name for it.

    return distributed.global_state.client


def shared_barrier(client: Any, process: int) -> Callable[..., None]:
    """Returns a barrier for orbax that raises in every process when one has failed.

    orbax names its barriers. A process whose write fails skips some of them, and the others would
    wait there for 20 minutes. Here every process meets the others at its n-th barrier whatever the
    name, and they compare the names.

    Args:
      client: of `jax.distributed`.
      process: number of this process.
    """
    lock, count = threading.Lock(), 0

    def meet(name: str, timeout_ms: int) -> dict[int, str]:
        nonlocal count
        with lock:
            count += 1
            folder = f"nmjax/save/{count}"
        client.key_value_set(f"{folder}/{process}", name)
        client.wait_at_barrier(folder, timeout_ms)
        told = client.key_value_dir_get(f"{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in told}

    def barrier(*, key: str, timeout_ms: int) -> None:
        while True:
            names = meet(key, timeout_ms)
            if set(names.values()) == {key}:
                return
            if not key.startswith(_LAST):
                failed = min(other for other, name in names.items() if name != key)
                raise OSError(f"process {failed} could not write its part")
            # The others raise now, and come to this barrier next.

    return barrier


def wait_for_others(seconds: float = 5) -> None:
    """Lets the other processes of a run end first, if they are about to.

    The first process is the coordinator. JAX kills the others as soon as it is gone, and they
    could not say why they ended.
    """
    if (connection := client()) is None:
        return
    # It raises when another process is stuck or gone.
    with suppress(jax.errors.JaxRuntimeError):
        connection.wait_at_barrier("nmjax/leave", int(1000 * seconds))
