"""Trains one network: `python -m experiments.train --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from experiments.flags import Flags
from experiments.processes import join_processes
from experiments.run import finish, open_run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m experiments.train`.

    Args:
      argv: flags; None for those of the command line.

    Returns:
      The exit status: 0 if the run is complete, 130 if Ctrl-C stopped it, 143 if SIGTERM did, 1 if
      it cannot go on.
    """
    flags = tyro.cli(Flags, args=argv, prog="python -m experiments.train")
    try:
        join_processes(flags.distributed, flags.coordinator, flags.processes, flags.process)
        return finish(open_run(flags))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
