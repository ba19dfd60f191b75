"""Folding batch normalization into the layer before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta, unfreeze

from nmjax.linen.forward_pass import check_module
from nmjax.packed.weight import is_packed

Path = tuple[str, ...]

# Their kernels have the outputs last, so that one scale for each output scales the kernel.
_LAYERS = (nn.Conv, nn.Dense)


class _Norm(NamedTuple):
    """A normalization, and the dtype of its input."""

    path: Path
    epsilon: float
    dtype: Any


def fold_batch_norm(
    module: nn.Module, variables: Mapping[str, Any], *inputs: Any, **kwargs: Any
) -> dict[str, Any]:
    """Moves the scale of each batch normalization into the convolution or Dense layer before it.

    In evaluation, batch normalization multiplies by `scale / sqrt(var + epsilon)` and adds a
    constant. This function multiplies the factor into the kernel, whose zeros stay zeros. The
    constant stays in the normalization, as its mean, with a scale of 1. So the unchanged module
    runs on the result. Fold first, then call `nmjax.pack`.

    The function traces the module to find out which layer feeds which normalization, and runs it
    to check that the outputs stay the same. It leaves other normalizations unchanged. The result
    is for serving, not for further training.

    Args:
      module: a linen module.
      variables: its `params`, `batch_stats` and any other collections that it reads.
      *inputs: arrays for `module`, of any batch size.
      **kwargs: further arguments of `module.apply`, such as `train=False`.

    Returns:
      Variables with the same tree, shapes and dtypes.

    Raises:
      ValueError: a normalization uses batch statistics, as in training; no layer feeds a
        normalization; the output of a folded layer is also used elsewhere, so that the outputs of
        the module would change.
      TypeError: `variables` contain packed weights, or `module` is not a linen module.

    >>> class Network(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.BatchNorm(use_running_average=True)(nn.Dense(2, use_bias=False)(x))
    >>> network, x = Network(), jnp.ones((1, 4))
    >>> variables = network.init(jax.random.key(0), x)
    >>> variables["params"]["BatchNorm_0"]["scale"] = jnp.array([3.0, 5.0])
    >>> folded = fold_batch_norm(network, variables, x)
    >>> factor = folded["params"]["Dense_0"]["kernel"] / variables["params"]["Dense_0"]["kernel"]
    >>> np.asarray(factor[0]).round(3).tolist()
    [3.0, 5.0]
    """
    check_module(module, "nmjax.linen.fold_batch_norm(module, variables, x)")
    if any(map(is_packed, jax.tree.leaves(variables, is_leaf=is_packed))):
        raise TypeError("some weights are already packed; call fold_batch_norm before nmjax.pack")
    pairs = _fed_norms(module, variables, inputs, kwargs)
    if not pairs:
        raise ValueError(
            f"{type(module).__name__} has no nn.BatchNorm that follows an nn.Conv or nn.Dense"
        )
    # New containers, because `_fold` changes them in place. The arrays are shared.
    folded = unfreeze(jax.tree.map(lambda leaf: leaf, variables))
    for layer, norm in pairs.items():
        _fold(folded, layer, norm)
    run = jax.jit(lambda variables: module.apply(variables, *inputs, **kwargs))
    _check_same(run(variables), run(folded), pairs, _coarsest(folded, pairs))
    return folded


def _fed_norms(
    module: nn.Module, variables: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[Path, _Norm]:
    """Path of a layer -> the normalization that takes its output."""
    # Tracers are compared by identity. The list keeps them alive, so that no identity is reused.
    outputs: list[tuple[Any, Path]] = []
    pairs: dict[Path, _Norm] = {}

    def watch(
        run: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        layer = context.module
        if context.method_name != "__call__" or layer.scope is None:
            return run(*args, **kwargs)
        path = tuple(layer.scope.path)
        if isinstance(layer, nn.BatchNorm) and args:
            # Check before running: Flax's own error would only name an immutable collection.
            _check_evaluates(layer, path, *args[1:], **kwargs)
            # Identity, not equality: anything between layer and normalization, such as an
            # activation or a reshape, makes a new tracer, and then the scale cannot be folded.
            fed = next((path for output, path in outputs if output is args[0]), None)
            if fed is not None:
                _check_axis(layer, path)
                pairs[fed] = _Norm(path, layer.epsilon, args[0].dtype)
        result = run(*args, **kwargs)
        if isinstance(layer, _LAYERS):
            outputs.append((result, path))
        return result

    def trace(variables: Any) -> Any:
        try:
            with nn.intercept_methods(watch):
                return module.apply(variables, *inputs, **kwargs)
        finally:
            outputs.clear()  # Tracers must not outlive their trace.

    jax.eval_shape(trace, variables)  # Tracing is enough: only the wiring matters.
    return pairs


def _check_evaluates(
    norm: nn.BatchNorm, path: Path, use_running_average: bool | None = None, **_: Any
) -> None:
    """Raises ValueError if a call with these arguments would use batch statistics."""
    if not nn.merge_param("use_running_average", norm.use_running_average, use_running_average):
        raise ValueError(
            f"{'/'.join(path)} uses the statistics of the batch, as in training; pass the argument "
            "that switches the module to evaluation, such as train=False"
        )


def _check_axis(norm: nn.BatchNorm, path: Path) -> None:
    if norm.axis not in (-1, (-1,)):
        raise ValueError(f"{'/'.join(path)} normalizes axis {norm.axis}; only -1 can be folded")


def _fold(variables: dict[str, Any], layer: Path, norm: _Norm) -> None:
    """Changes the variables of one layer and its normalization in place."""
    params = _at(variables["params"], layer)
    stats = _at(variables["batch_stats"], norm.path)
    affine = _at(variables["params"], norm.path)
    mean, var = (meta.unbox(stats[name]) for name in ("mean", "var"))
    factor = 1 / jnp.sqrt(var + norm.epsilon)
    factor = factor * meta.unbox(affine["scale"]) if "scale" in affine else factor
    offset = meta.unbox(affine["bias"]) if "bias" in affine else jnp.zeros_like(mean)

    def scaled(leaf: jax.Array) -> jax.Array:
        # Under nn.scan all leaves have a leading axis of layers, which must stay aligned.
        ones = (1,) * (leaf.ndim - factor.ndim)
        shape = (*factor.shape[:-1], *ones, factor.shape[-1])
        return (leaf * factor.reshape(shape)).astype(leaf.dtype)

    for name in ("kernel", "bias"):
        if name in params:
            params[name] = meta.replace_boxed(params[name], scaled(meta.unbox(params[name])))
    # The normalization now divides by sqrt(var + epsilon) = 1, and subtracts the new mean.
    neutral = {"scale": jnp.ones_like(factor), "bias": jnp.zeros_like(offset)}
    for name in neutral.keys() & affine.keys():
        affine[name] = meta.replace_boxed(affine[name], neutral[name])
    changed = {"mean": mean * factor - offset, "var": jnp.full_like(var, 1 - norm.epsilon)}
    for name, leaf in changed.items():
        stats[name] = meta.replace_boxed(stats[name], leaf.astype(mean.dtype))


def _at(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """The subtree at a path; empty if a normalization has no parameters."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _coarsest(variables: dict[str, Any], pairs: dict[Path, _Norm]) -> float:
    """The largest epsilon among the dtypes that folding rounds to."""
    dtypes = [norm.dtype for norm in pairs.values()]
    # Weights may be narrower than the input, whose dtype the module then computes in.
    for layer, norm in pairs.items():
        changed = (_at(variables["params"], layer), _at(variables["batch_stats"], norm.path))
        dtypes += [leaf.dtype for leaf in jax.tree.leaves(changed)]
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def _check_same(before: Any, after: Any, pairs: dict[Path, _Norm], epsilon: float) -> None:
    # Folding rounds differently, and rounding errors grow through the layers: hence the square
    # root of epsilon. A layer that feeds something else is off by far more.
    tolerance = epsilon**0.5
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
        largest = np.abs(old).max(initial=0.0)
        if not np.allclose(new, old, rtol=0, atol=tolerance * largest, equal_nan=True):
            raise ValueError(
                "folding changed the module's outputs by up to "
                f"{np.abs(new - old).max():.3g} of {largest:.3g}: one of these layers feeds more "
                f"than its normalization: {', '.join('/'.join(path) for path in pairs)}"
            )
