"""Several processes that train one network, each on the devices it has."""

from __future__ import annotations

import jax


def join_processes(
    distributed: bool, coordinator: str | None, processes: int | None, process: int | None
) -> None:
    """Connects this process with the others of its run; must come before JAX computes anything.

    Args:
      distributed: whether to ask the cluster (Slurm, Open MPI, Kubernetes, TPU) for what is not
        given. JAX_COORDINATOR_ADDRESS is heeded too.
      coordinator: "host:port" of process 0.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      ValueError: some of the last three are given and others not, without `distributed`; or the
        cluster does not say what is missing.
    """
    given = (coordinator, processes, process)
    if not distributed and given == (None, None, None):
        return
    if not distributed and None in given:
        raise ValueError(
            "several processes need --coordinator, --processes and --process together, or "
            f"--distributed to ask the cluster; got {coordinator}, {processes} and {process}"
        )
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as error:
        raise ValueError(
            f"the processes cannot be joined: {error} Give --coordinator, --processes and --process"
        ) from error


def is_first() -> bool:
    """Whether this process writes and prints for all."""
    return jax.process_index() == 0
