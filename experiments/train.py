"""Trains one network: `python -m experiments.train --help`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import jax
import tyro

from experiments.distributed.processes import join_processes, leave
from experiments.training.flags import Flags
from experiments.training.run import COMPLETE, PREEMPTED, Run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m experiments.train`, with the flags of the command line or these.

    Returns the exit status: 0 for a complete run, 130 after Ctrl-C, 143 after SIGTERM, 1 for a run
    that cannot continue.
    """
    flags = tyro.cli(Flags, args=argv, prog="python -m experiments.train")
    run = None
    try:
        join_processes(flags.distributed, flags.coordinator, flags.processes, flags.process)
        run = Run(flags)
        status = run.finish()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except Exception:
        if jax.process_count() == 1:
            raise
        # We cannot tell whether the other processes failed too.
        traceback.print_exc()
        leave(1)
    # Processes are rejected, complete or preempted together. In other cases only this one may stop.
    if run is not None and status not in (COMPLETE, PREEMPTED) and jax.process_count() > 1:
        leave(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
