"""Batch normalisation folded into the layer before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta, unfreeze

from nmjax.packed.weight import is_packed

Path = tuple[str, ...]

# Their kernels have the outputs last, and one scale for each is a scale of the kernel.
_LAYERS = (nn.Conv, nn.Dense)


class _Norm(NamedTuple):
    """A normalisation, and the dtype of what it takes."""

    path: Path
    epsilon: float
    dtype: Any


def fold_batch_norm(
    module: nn.Module, variables: Mapping[str, Any], *inputs: Any, **kwargs: Any
) -> dict[str, Any]:
    """Moves the scale of each batch normalisation into the convolution or Dense before it.

    In evaluation a normalisation multiplies by `scale / sqrt(var + epsilon)` and adds a constant.
    The product goes into the kernel, whose zeros stay zeros; the constant stays behind as the
    mean of a normalisation that changes nothing else. So the unchanged module runs on the result,
    and so does the packed one: fold first, then `nmjax.pack`. A normalisation that follows
    something else stays as it is. The result is for serving, not for further training.

    Which layer feeds which normalisation is seen in a run of the module, and a second run checks
    that the outputs are the same.

    Args:
      module: a linen module.
      variables: its `params` and `batch_stats`, and what else it reads.
      *inputs: arrays that `module` takes, of any batch size.
      **kwargs: further arguments of `module.apply`, such as `train=False`.

    Returns:
      Variables of the same tree, shapes and dtypes.

    Raises:
      ValueError: a normalisation uses the statistics of the batch, as in training; no layer feeds
        one; a layer that feeds one is used elsewhere too, so that the outputs would change.
      TypeError: `variables` hold packed weights, or `module` is not a linen module.

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
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a linen module instance such as nn.Dense(4), got {module!r}")
    if any(map(is_packed, jax.tree.leaves(variables, is_leaf=is_packed))):
        raise TypeError("some weights are packed already; fold first, then nmjax.pack")
    pairs = _fed_norms(module, variables, inputs, kwargs)
    if not pairs:
        raise ValueError(
            f"no nn.BatchNorm of {type(module).__name__} takes the output of an nn.Conv or nn.Dense"
        )
    folded = unfreeze(jax.tree.map(lambda leaf: leaf, variables))
    for layer, norm in pairs.items():
        _fold(folded, layer, norm)
    run = jax.jit(lambda variables: module.apply(variables, *inputs, **kwargs))
    _check_same(run(variables), run(folded), pairs)
    return folded


def _fed_norms(
    module: nn.Module, variables: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[Path, _Norm]:
    """Path of a layer -> the normalisation that takes its output."""
    outputs: list[tuple[Any, Path]] = []  # Kept alive, so that no other gets the same identity.
    pairs: dict[Path, _Norm] = {}

    def watch(
        run: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        layer = context.module
        if context.method_name != "__call__" or layer.scope is None:
            return run(*args, **kwargs)
        path = tuple(layer.scope.path)
        if isinstance(layer, nn.BatchNorm) and args:
            # Before it runs, since Flax's own complaint would be about a collection.
            _check_evaluates(layer, path, *args[1:], **kwargs)
            fed = next((path for output, path in outputs if output is args[0]), None)
            if fed is not None:
                _check_axis(layer, path)
                pairs[fed] = _Norm(path, layer.epsilon, args[0].dtype)
        result = run(*args, **kwargs)
        if isinstance(layer, _LAYERS):
            outputs.append((result, path))
        return result

    def trace(variables: Any) -> Any:
        with nn.intercept_methods(watch):
            return module.apply(variables, *inputs, **kwargs)

    jax.eval_shape(trace, variables)
    return pairs


def _check_evaluates(
    norm: nn.BatchNorm, path: Path, use_running_average: bool | None = None, **_: Any
) -> None:
    """Raises ValueError if a call with these arguments is one of training."""
    if not nn.merge_param("use_running_average", norm.use_running_average, use_running_average):
        raise ValueError(
            f"{'/'.join(path)} uses the statistics of the batch, as in training; pass what makes "
            "the module evaluate, such as train=False"
        )


def _check_axis(norm: nn.BatchNorm, path: Path) -> None:
    if norm.axis not in (-1, (-1,)):
        raise ValueError(f"{'/'.join(path)} normalises axis {norm.axis}; only -1 can be folded")


def _fold(variables: dict[str, Any], layer: Path, norm: _Norm) -> None:
    """Changes the variables of one layer and its normalisation in place."""
    params = _at(variables["params"], layer)
    stats = _at(variables["batch_stats"], norm.path)
    affine = _at(variables["params"], norm.path)
    mean, var = (meta.unbox(stats[name]) for name in ("mean", "var"))
    factor = 1 / jnp.sqrt(var + norm.epsilon)
    factor = factor * meta.unbox(affine["scale"]) if "scale" in affine else factor
    offset = meta.unbox(affine["bias"]) if "bias" in affine else jnp.zeros_like(mean)

    def scaled(leaf: jax.Array) -> jax.Array:
        ones = (1,) * (leaf.ndim - factor.ndim)
        shape = (*factor.shape[:-1], *ones, factor.shape[-1])
        return (leaf * factor.reshape(shape)).astype(leaf.dtype)

    for name in ("kernel", "bias"):
        if name in params:
            params[name] = meta.replace_boxed(params[name], scaled(meta.unbox(params[name])))
    neutral = {"scale": jnp.ones_like(factor), "bias": jnp.zeros_like(offset)}
    for name in neutral.keys() & affine.keys():
        affine[name] = meta.replace_boxed(affine[name], neutral[name])
    changed = {"mean": mean * factor - offset, "var": jnp.full_like(var, 1 - norm.epsilon)}
    for name, leaf in changed.items():
        stats[name] = meta.replace_boxed(stats[name], leaf.astype(mean.dtype))


def _at(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """The subtree at a path; empty where a normalisation has no parameters."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _check_same(before: Any, after: Any, pairs: dict[Path, _Norm]) -> None:
    tolerance = max(float(jnp.finfo(norm.dtype).eps) ** 0.5 for norm in pairs.values())
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
        largest = np.abs(old).max(initial=0.0)
        if not np.allclose(new, old, rtol=0, atol=tolerance * largest, equal_nan=True):
            raise ValueError(
                "outputs changed when normalisations were folded, by up to "
                f"{np.abs(new - old).max():.3g} of {largest:.3g}: the output of a layer is used "
                f"elsewhere too, one of {', '.join('/'.join(path) for path in pairs)}"
            )
