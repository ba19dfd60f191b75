"""Counts the multiply-adds of each parameter by reading the traced program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nmjax.tracing.program import read_program


def multiply_adds(forward: Callable[..., Any], params: Any, *inputs: Any) -> dict[str | None, int]:
    """Counts the multiply-adds of `forward(params, *inputs)` for each parameter.

    Each matrix product and convolution is charged to the parameter that feeds it, even if the
    program masks, reshapes or casts that parameter first. Shared weights are charged once for each
    use, scanned layers once for each pass. Products with padding count. A conditional counts as its
    first branch, which `lax.cond` takes if its predicate is false. A while loop counts as one pass.

    Args:
      forward: the network's forward pass; it is traced, not run.
      params: its parameters, arrays or ShapeDtypeStructs.
      *inputs: its inputs, arrays or ShapeDtypeStructs.

    Returns:
      Leaf name -> multiply-adds, for the leaves that have any. The key None stands for products
      of activations, such as attention scores.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.zeros((8, 16))}
    >>> multiply_adds(lambda params, x: x @ params["kernel"], params, jnp.zeros((2, 8)))
    {'kernel': 256}
    """
    program = read_program(forward, params, *inputs)
    counts: dict[str | None, int] = {
        name: uses.multiply_adds for name, uses in program.uses.items() if uses.multiply_adds
    }
    if program.other_multiply_adds:
        counts[None] = program.other_multiply_adds
    return counts
