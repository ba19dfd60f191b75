"""Prints the ladder of a comparison: `python -m experiments.ladder FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.json_files import read_json
from experiments.ladder.table import ladder
from experiments.report.numbers import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.ladder", description=__doc__)
    parser.add_argument("folder", type=Path, help="of `python -m experiments.compare`")
    parser.add_argument("--reference", default="sr_ste", help="compared with (default: sr_ste)")
    args = parser.parse_args(argv)
    try:
        print(ladder(Run(read_json(args.folder / "results.json")), args.reference), end="")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
