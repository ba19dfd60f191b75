"""Trains one network: `python -m experiments.train --help`."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence

import jax
import tyro

from experiments.distributed.processes import (
    is_first,
    join_processes,
    leave,
    leave_if_interrupted,
)
from experiments.distributed.stopping import INTERRUPTED, ending_at_the_second
from experiments.training.flags import Flags, as_flags
from experiments.training.packing import pack_command
from experiments.training.run import COMPLETE, PREEMPTED, Run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m experiments.train`, with the flags of the command line or these.

    Returns the exit status: 0 for a complete run, 130 after Ctrl-C, 143 after SIGTERM, 1 for a run
    that cannot continue.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = tyro.cli(Flags, args=argv, prog="python -m experiments.train")
    with ending_at_the_second():
        status = _train(flags)
    if status == COMPLETE and is_first() and (command := pack_command(argv, flags)):
        print(f"to pack the network: {command}")
    return status


def _train(flags: Flags) -> int:
    run = None
    try:
        join_processes(flags.distributed, flags.coordinator, flags.processes, flags.process)
        run = Run(flags)
        status = run.finish()
    except KeyboardInterrupt:
        print("stopped before training began" if run is None else "stopped", file=sys.stderr)
        status = INTERRUPTED
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {as_flags(str(error))}", file=sys.stderr)
        status = 1
    except Exception:
        if jax.process_count() == 1:
            raise
        # We cannot tell whether the other processes failed too.
        traceback.print_exc()
        leave(1)
    # Processes are rejected, complete or preempted together. In other cases only this one may stop.
    has_begun = run is not None or status == INTERRUPTED
    if has_begun and status not in (COMPLETE, PREEMPTED) and jax.process_count() > 1:
        leave(status)
    return status


if __name__ == "__main__":
    exit_status = main()
    # Python's own exit takes a moment, and Ctrl-C would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_if_interrupted(exit_status)
    sys.exit(exit_status)
