"""Compiles masks, packed products and training steps for TPUs and H100s that are not there.

    make bench-aot                              # all; hours on two cores, interrupted runs go on
    make bench-aot ARGS="--only masks v5e 2:4"  # rows whose keys contain all three

Nothing runs on such a device: the numbers are what the vendors' compilers say of the programs
that they make. Each row is kept in runs/aot as soon as it is computed; --again computes it once
more. The JSON file in results/ has all rows that are kept, and what it had of other rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from experiments.benchmarks.aot import compilers

SECTIONS = ("masks", "schedules", "decode", "gpu", "nvcc", "steps")


def main() -> None:
    """Runs each section in a process of its own, and writes the JSON file."""
    flags = _flags()
    if flags.section is not None:
        _section(flags)
        return
    for section in SECTIONS:
        if not flags.only or _may_have(section, flags.only):
            # The compilers read their options once a process.
            command = [sys.executable, "-m", "experiments.benchmarks.aot", "--section", section]
            subprocess.run([*command, *sys.argv[1:]], check=True)
    if not flags.list:
        _write(flags.kept)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="texts that a row's key contains")
    parser.add_argument("--again", action="store_true", help="compute rows that are there, too")
    parser.add_argument("--list", action="store_true", help="print the rows' keys and stop")
    parser.add_argument("--layers", type=int, help="layers of the decoders, for a quick look")
    parser.add_argument(
        "--peer", type=Path, help="a checkout of vllm-project/tpu-inference, to compile beside ours"
    )
    parser.add_argument("--kept", type=Path, default=Path("runs/aot"), help="folder of the rows")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _may_have(section: str, only: list[str]) -> bool:
    named = [text for text in only if text.split("/")[0] in SECTIONS]
    return not named or any(text.split("/")[0] == section for text in named)


def _section(flags: argparse.Namespace) -> None:
    # First of all: the compilers read the environment when JAX starts them.
    dump = Path(tempfile.mkdtemp())
    compilers.set_up(dump if flags.section in ("schedules", "decode") else None)
    from experiments.benchmarks.aot import decode, gpu, masks, nvcc, steps
    from experiments.benchmarks.aot.rows import chosen, compute

    if flags.section == "decode" and flags.peer is None:
        print("without --peer, tpu-inference's kernel is not compiled beside ours")
    found = {
        "masks": lambda: masks.rows(),
        "schedules": lambda: masks.schedule_rows(dump),
        "decode": lambda: decode.rows(dump, flags.peer),
        "gpu": lambda: gpu.rows(),
        "nvcc": lambda: nvcc.rows(),
        "steps": lambda: steps.rows(flags.layers),
    }[flags.section]()
    rows = chosen(found, flags.only)
    if flags.list:
        print("\n".join(row.key for row in rows))
    else:
        compute(rows, flags.kept, again=flags.again)
    dump.rmdir()


def _write(kept: Path) -> None:
    compilers.set_up()
    from experiments.benchmarks.aot.page import tables
    from experiments.benchmarks.aot.rows import collect
    from experiments.benchmarks.timing import RESULTS, write_results

    written = RESULTS / "aot.json"
    earlier = json.loads(written.read_text("utf-8"))["results"]["rows"] if written.exists() else []
    rows = collect(kept, earlier)
    versions = {name: _version(name) for name in ("libtpu", "jax-cuda13-pjrt", "qwix")}
    file = write_results("aot", {"compilers": versions, "rows": rows})
    print(tables(rows))
    print(f"{len(rows)} rows written to {file}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
