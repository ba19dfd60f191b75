"""Time of N:M masks: `python -m experiments.benchmarks.masks`.

The baseline of a mask is `w > 0` of the same matrix: the cheapest operation that reads it and
writes a boolean for each entry. The baseline of applying a mask is a copy of the matrix. The table
also has two common ways to compute a mask: `lax.top_k`, and ranks from two argsorts.

The baseline runs next to every row, and its time jumps when the memory allocator asks the system
for fresh pages. So there are two ratios: `ratio` to the baseline timed with the row, and
`strict_ratio` to the fastest baseline of the whole table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.timing import interleaved_medians, print_table, write_results
from nmjax.masks.nm import nm_mask

PATTERNS = [(2, 4), (4, 8), (1, 16), (8, 32)]
AXES = [-2, -1]
DTYPES = ["float32", "bfloat16"]

Mask = Callable[[jax.Array, int, int, int], jax.Array]


def top_k_mask(w: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Keeps what `lax.top_k` returns for each group."""
    groups = _groups_last(w, m, axis)
    _, kept = jax.lax.top_k(jnp.abs(groups), n)
    mask = jax.nn.one_hot(kept, m, dtype=bool).any(axis=-2)
    return jnp.moveaxis(mask.reshape(*groups.shape[:-2], -1), -1, axis)


def argsort_mask(w: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Keeps ranks below n, where a rank is the argsort of an argsort."""
    groups = _groups_last(w, m, axis)
    rank = jnp.argsort(jnp.argsort(-jnp.abs(groups), axis=-1), axis=-1)
    return jnp.moveaxis((rank < n).reshape(*groups.shape[:-2], -1), -1, axis)


def _groups_last(w: jax.Array, m: int, axis: int) -> jax.Array:
    w = jnp.moveaxis(w, axis, -1)
    return w.reshape(*w.shape[:-1], -1, m)


MASKS: dict[str, Mask] = {"nm_mask": nm_mask, "top_k": top_k_mask, "argsort": argsort_mask}


def mask_rows(w: jax.Array, rounds: int) -> list[dict[str, Any]]:
    """Times masks against `w > 0`."""
    rows = []
    for n, m in PATTERNS:
        functions = {
            (name, axis): jax.jit(lambda w, f=f, n=n, m=m, axis=axis: f(w, n, m, axis))
            for axis in AXES
            for name, f in MASKS.items()
        }
        rows += _rows("mask", n, m, w, functions, jax.jit(lambda w: w > 0), rounds)
    return rows


def apply_rows(w: jax.Array, rounds: int) -> list[dict[str, Any]]:
    """Times mask and apply against a copy."""
    rows = []
    for n, m in PATTERNS:
        functions = {
            ("nm_mask", axis): jax.jit(
                lambda w, n=n, m=m, axis=axis: jnp.where(nm_mask(w, n, m, axis), w, 0)
            )
            for axis in AXES
        }
        rows += _rows("mask and apply", n, m, w, functions, jax.jit(jnp.copy), rounds)
    return rows


def _rows(
    what: str,
    n: int,
    m: int,
    w: jax.Array,
    functions: Mapping[tuple[str, int], Callable[[jax.Array], jax.Array]],
    baseline: Callable[[jax.Array], jax.Array],
    rounds: int,
) -> list[dict[str, Any]]:
    # One comparison a row: what a slow rival leaves in the caches would count against us.
    rows = []
    for (name, axis), function in functions.items():
        compiled = function.lower(w).compile()  # type: ignore[attr-defined]
        repeats = rounds if name == "nm_mask" else 3  # The rivals take seconds.
        seconds = interleaved_medians({"it": compiled, "base": baseline}, w, rounds=repeats)
        rows.append(
            {
                "what": what,
                "by": name,
                "pattern": f"{n}:{m}",
                "axis": axis,
                "dtype": str(w.dtype),
                "size": w.shape[0],
                "temporary_MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
                "ms": 1e3 * seconds["it"],
                "baseline_ms": 1e3 * seconds["base"],
                "ratio": seconds["it"] / seconds["base"],
            }
        )
    return rows


def add_strict_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its time over the fastest time of the same baseline in any row."""
    for row in rows:
        alike = [r for r in rows if (r["what"], r["dtype"]) == (row["what"], row["dtype"])]
        row["strict_ratio"] = row["ms"] / min(r["baseline_ms"] for r in alike)


def main() -> None:
    """Runs the benchmark, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns (default 4096)")
    parser.add_argument("--rounds", type=int, default=31, help="timed rounds (default 31)")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        w = jax.random.normal(jax.random.key(0), (arguments.size, arguments.size), dtype)
        rows += mask_rows(w, arguments.rounds) + apply_rows(w, arguments.rounds)
    add_strict_ratios(rows)
    print_table("N:M masks", rows)
    print(f"written to {write_results(f'masks-{jax.default_backend()}', rows)}")


if __name__ == "__main__":
    main()
