"""Rounds packed weights, and the inputs of their products, to int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nmjax.packed.quantized import Quantized
from nmjax.packed.rounding import LARGEST
from nmjax.packed.weight import Packed, is_packed
from nmjax.ste import check_has_values
from nmjax.trees.leaves import map_named, named_leaves

# Static steps reach this many root mean squares of the widest input.
_REACH = 6


def quantize(
    packed: Any,
    statistics: Mapping[str, Any] | None = None,
    *,
    inputs: Literal["float", "dynamic"] = "float",
) -> Any:
    r"""Rounds packed weights to int8, with one scale for each output.

    A kept weight w of output o becomes the integer

    $$q = \operatorname{round}(w / s_o), \qquad s_o = \max |w_{\cdot, o}| / 127$$

    and products compute `s_o * sum(x * q)`. Half a step, `s_o / 2`, is the largest error of a
    weight. Where values were, and so every pattern, does not change. Rounding takes a few dense
    float32 copies of one weight at a time.

    With `inputs="dynamic"`, matrix products round each row x of inputs in the same way, with a
    scale `t = max |x| / 127` of its own, and compute `t * s_o * sum(round(x / t) * q)`. The sum is
    exact, in int32. A row with a NaN or an infinity makes NaN. Gradients pass as if nothing had
    been rounded. Kernels of convolutions keep float inputs.

    With statistics, all rows share a scale, `t = 6 r / 127`, where r is the root mean square of the
    widest input. Inputs beyond `127 t` saturate: they count as `127 t`. `leaf.saturated(x)` says
    how many do.

    Args:
      packed: a tree from `nmjax.pack` or `nmjax.load_packed`; leaves that are not packed stay.
      statistics: leaf name -> mean squares of its inputs, as `nmjax.post_training.collect` returns
        them: (*stack, groups, in).
      inputs: `"float"` rounds weights only, `"dynamic"` the inputs of products too.

    Returns:
      The same tree with a `nmjax.Quantized` for each packed leaf.

    Raises:
      ValueError: another kind of inputs; statistics that are missing, zero or not finite; nothing
        is packed; a leaf is quantized already, or has weights that are NaN or infinite. (Inside
        `jax.jit`, where values are unknown, the scales of such outputs, and all their products,
        become NaN or infinite.)
      TypeError: a packed leaf holds ShapeDtypeStructs.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[1.0], [0.0], [-12.7], [0.0]])}
    >>> packed = nmjax.pack(params, nmjax.make_plan(params, "2:4"))
    >>> kernel = quantize(packed)["kernel"]
    >>> kernel.values.ravel().tolist(), kernel.scales.round(3).tolist()
    ([10, -127], [0.10000000149011612])
    >>> bool(jnp.allclose(nmjax.packed_matmul(jnp.ones((1, 4)), kernel), 1.0 - 12.7))
    True

    Source: symmetric, per-channel rounding, as in Nagel et al., "A White Paper on Neural Network
    Quantization", https://arxiv.org/abs/2106.08295, section 2.2.
    """
    if inputs not in ("float", "dynamic"):
        raise ValueError(f'inputs must be "float" or "dynamic", got {inputs!r}')
    if inputs == "dynamic" and statistics is not None:
        raise ValueError('inputs="dynamic" does not use statistics; pass one of them')
    leaves = {
        name: leaf for name, leaf in named_leaves(packed, is_leaf=is_packed).items()
        if is_packed(leaf)
    }  # fmt: skip
    if not leaves:
        raise ValueError("there is nothing to quantize: no leaf is packed; call nmjax.pack first")
    for name, leaf in leaves.items():
        if isinstance(leaf, Quantized):
            raise ValueError(f"{name or 'the weight'} {leaf} is quantized already")
        check_has_values(leaf.values, name or "the packed weight")
        leaf.check_arrays()
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{name or 'the weight'} {leaf} has values of {leaf.dtype}, not floats")
    made = {
        name: replace(_of(leaf), inputs_are="float" if _has_taps(leaf) else inputs)
        for name, leaf in leaves.items()
    }
    _check_finite({name: leaf.scales for name, leaf in made.items()})
    if statistics is not None:
        made |= {
            name: _with_steps(name, leaf, statistics)
            for name, leaf in made.items()
            if not _has_taps(leaf)
        }
    return map_named(lambda name, leaf: made.get(name, leaf), packed, is_leaf=is_packed)


@jax.jit
def _of(packed: Packed) -> Quantized:
    return Quantized.of(packed)


def _with_steps(name: str, leaf: Quantized, statistics: Mapping[str, Any]) -> Quantized:
    """The same weight with steps for its inputs."""
    if name not in statistics:
        raise ValueError(f"there are no statistics of {name or 'the weight'}: {list(statistics)}")
    means = getattr(statistics, "mean_square", statistics.__getitem__)(name)
    leading = leaf.scales.shape[:-1]
    means = jnp.asarray(means, jnp.float32)
    if means.shape[: len(leading)] != leading or means.shape[-1] != leaf.inputs:
        raise ValueError(
            f"the statistics of {name} have shape {means.shape}; expected mean squares of shape "
            f"{(*leading, 1, leaf.inputs)}"
        )
    widest = means.reshape(*leading, -1).max(axis=-1)
    if not isinstance(widest, jax.core.Tracer) and not (jnp.isfinite(widest) & (widest > 0)).all():
        raise ValueError(f"the statistics of {name} should be finite and not all zero")
    steps = _REACH * jnp.sqrt(widest) / LARGEST
    return replace(leaf, inputs_are="static", input_steps=steps)


def _has_taps(packed: Packed) -> bool:
    # Leading axes that the plan does not know are a stack; some groups run over their taps.
    return bool(packed.leaf_plan.tap_axes or (packed.kernel_taps and not packed.taps))


def _check_finite(scales: dict[str, jax.Array]) -> None:
    """Raises ValueError if scales whose values are known are not finite."""
    known = {
        name: jnp.isfinite(array).all()
        for name, array in scales.items()
        if not isinstance(array, jax.core.Tracer)
    }
    bad = [name or "the weight" for name, good in jax.device_get(known).items() if not good]
    if bad:
        raise ValueError(f"these weights are NaN or infinite somewhere: {', '.join(bad)}")
