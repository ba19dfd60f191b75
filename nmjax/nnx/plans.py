"""Plans of NNX modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nmjax import planning
from nmjax.patterns import Pattern
from nmjax.plans import Plan


def make_plan(
    model: nnx.Module,
    pattern: str | Pattern,
    inputs: Sequence[Any],
    *,
    call: Mapping[str, Any] | None = None,
    **selection: Any,
) -> Plan:
    """Decides which parameters of a module become sparse, along the axes that it sums over.

    The module is traced, not run, and stays as it is: `nmjax.make_plan` reads the axes off its
    program. The plan is for `nnx.state(model, nnx.Param)`.

    Args:
      model: an NNX module, or its shapes (`nnx.eval_shape`). Dropout and batch normalization are
        traced as the module is set (`model.train()`, `model.eval()`).
      pattern: such as `"2:4"`.
      inputs: the arguments of the module's `__call__`, in a tuple: arrays, ShapeDtypeStructs, or
        shapes of float32 arrays.
      call: keyword arguments of `__call__`, which stay as they are.
      **selection: other arguments of `nmjax.make_plan`, such as `exclude`.

    Raises:
      TypeError: `model` is not an NNX module.
      ValueError: what `nmjax.make_plan` raises.

    >>> plan = make_plan(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), "2:4", inputs=((1, 8),))
    >>> plan["kernel"].reduction_axes, plan["kernel"].source
    ((-2,), 'program')
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"expected an NNX module, got {type(model).__name__}")
    if not isinstance(inputs, tuple | list):
        raise TypeError(
            "inputs= must be a tuple of the arguments of the module's __call__, such as "
            f"inputs=(x,); got {type(inputs).__name__}"
        )
    # Caches hold what earlier inputs left behind. Other states, such as running statistics and
    # masks, do not depend on the input: as inputs they would count as activations.
    graph, *states = nnx.split(model, nnx.Param, (nnx.Cache, nnx.RngState), ...)
    params, cache, rest = states
    settings = dict(call or {})

    def forward(params: Any, cache: Any, *inputs: Any) -> Any:
        constants = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), rest)
        return nnx.merge(graph, params, cache, constants)(*inputs, **settings)

    return planning.make_plan(
        params, pattern, forward=forward, inputs=(cache, *inputs), **selection
    )
