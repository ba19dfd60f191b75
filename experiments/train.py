"""Trains one network: `python -m experiments.train --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from experiments.flags import Flags
from experiments.run import finish, open_run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m experiments.train`.

    Args:
      argv: flags; None for those of the command line.

    Returns:
      The exit status: 0 if the run is complete, 130 if Ctrl-C stopped it, 1 if it cannot go on.
    """
    try:
        run = open_run(tyro.cli(Flags, args=argv, prog="python -m experiments.train"))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        return 0 if finish(run) else 130
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
