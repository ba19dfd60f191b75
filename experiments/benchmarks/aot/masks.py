"""Masks, and masks applied, compiled for each TPU: bytes and temporaries; schedules of kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nmjax
from experiments.benchmarks.aot import bundles, compilers
from experiments.benchmarks.aot.rows import Row
from experiments.benchmarks.aot.statistics import statistics

PATTERNS = ("2:4", "1:4", "4:8", "1:8", "1:16", "8:32")
DTYPES = ("float32", "bfloat16")
AXES = (-2, -1)
SHAPE = (4096, 4096)

Mask = Callable[[jax.Array, int, int, int], jax.Array]


def qwix_mask(w: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """The mask of Google's qwix, by `top_k`."""
    from qwix._src.core.sparsity import get_sparsity_mask

    found: jax.Array = get_sparsity_mask(w, n, m, order="C" if axis == -2 else "R")
    return found


MASKS: dict[str, Mask] = {"nmjax": nmjax.nm_mask, "qwix": qwix_mask}


def program(what: str, mask: Mask, pattern: str, axis: int) -> Callable[[jax.Array], jax.Array]:
    """What is compiled.

    Args:
      what: "mask" of a matrix; the matrix with its mask applied, "apply"; or also rounded to
        bfloat16, "round".
      mask: a function from (weights, n, m, axis).
      pattern: such as "2:4".
      axis: along which groups run.
    """
    n, m = map(int, pattern.split(":"))
    if what in ("apply", "round") and mask is nmjax.nm_mask:
        # What users call: it may compute and apply a mask in one pass.
        shape = {"kernel": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
        plan = nmjax.make_plan(shape, nmjax.NM(n, m), axes={"kernel": (axis,)})
        dtype = jnp.bfloat16 if what == "round" else None
        return lambda w: nmjax.sparsify({"kernel": w}, plan, dtype=dtype)["kernel"]

    def masked(w: jax.Array) -> jax.Array:
        kept = mask(w, n, m, axis)
        return kept if what == "mask" else jnp.where(kept, w, 0)

    return masked


def least_bytes(what: str, dtype: str) -> int:
    """Bytes of one read of the matrix and one write of the result."""
    size = jnp.dtype(dtype).itemsize
    return math.prod(SHAPE) * (size + {"mask": 1, "apply": size, "round": 2}[what])


def rows() -> Iterator[Row]:
    """HBM bytes over one read and one write, and temporaries, of every mask."""
    for chip, pattern, dtype, axis, what, by in product(
        compilers.CHIPS, PATTERNS, DTYPES, AXES, ("apply", "mask", "round"), MASKS
    ):
        if what == "round" and dtype == "bfloat16":
            continue
        if by == "nmjax" or (chip == "v5e" and what == "apply"):
            settings = (chip, pattern, dtype, axis, what, by)
            yield Row("/".join(map(str, ("masks", *settings))), partial(_bytes, *settings))


def _bytes(chip: str, pattern: str, dtype: str, axis: int, what: str, by: str) -> dict[str, Any]:
    found = statistics(_lower(chip, pattern, dtype, axis, what, by).compile())
    return {
        "bytes_over_least": found["bytes_accessed"] / least_bytes(what, dtype),
        "temporaries_MiB": found["temporaries"] / 2**20,
        **{name: found[name] for name in ("copies", "fusions", "kernels", "optimal_seconds")},
    }


def _lower(
    chip: str, pattern: str, dtype: str, axis: int, what: str, by: str
) -> jax.stages.Lowered:
    function = program(what, MASKS[by], pattern, axis)
    return jax.jit(function).lower(compilers.on_chip(chip, SHAPE, dtype))


def schedule_rows(dump: Path) -> Iterator[Row]:
    """Estimated time of computing of the Pallas kernels, over the time of one read and write."""
    for settings in product(compilers.CHIPS, PATTERNS, DTYPES, AXES, ("apply", "mask", "round")):
        if settings[2] == "bfloat16" and settings[4] == "round":
            continue
        key = "/".join(map(str, ("schedules", *settings)))
        yield Row(key, partial(_schedule, dump, *settings))


def _schedule(
    dump: Path, chip: str, pattern: str, dtype: str, axis: int, what: str
) -> dict[str, Any]:
    lowered = _lower(chip, pattern, dtype, axis, what, "nmjax")
    # The schedules of what XLA makes of a mask without a kernel take minutes to write.
    if "tpu_custom_call" not in lowered.as_text():
        return {"kernels": []}
    with bundles.dumped(dump):
        lowered.compile()
        found = bundles.kernels(dump)
    return bundles.estimate(found, least_bytes(what, dtype), chip)
