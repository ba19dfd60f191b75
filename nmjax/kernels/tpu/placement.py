"""Calls of kernels that the compiler for TPUs cannot split over the axes of a mesh.

It splits no kernel, and it refuses custom partitioning. So a kernel runs where one device holds
whole operands: in programs for one device, and inside `jax.shard_map`. How many devices a program
is for is known when it is lowered, not when it is traced. How operands lie on explicit axes is
known when it is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from nmjax.masks.platforms import is_whole


def on_whole_operands(
    kernel: Callable[..., jax.Array], otherwise: Callable[..., jax.Array] | None, *operands: Any
) -> jax.Array:
    """`kernel(*operands)` where a device has whole operands, and `otherwise(*operands)` elsewhere.

    Args:
      kernel: a function of arrays with a Pallas kernel for TPUs in it.
      otherwise: the same in plain XLA; None raises NotImplementedError.
      *operands: arrays.
    """
    ways = [None if f is None else jax.make_jaxpr(f)(*operands) for f in (kernel, otherwise)]
    result: jax.Array = _primitive().bind(*operands, kernel=ways[0], otherwise=ways[1])
    return result


def explicit_axes(x: jax.Array, weight: Any) -> tuple[Any, Any, Any] | None:
    """The mesh, and its axes that split x's rows and the weight's outputs, of a product.

    None: no operand is sharded over explicit axes, or not so that each device can multiply what it
    holds.

    Args:
      x: (rows, inputs).
      weight: a tree of arrays whose last axis are the outputs.
    """
    shardings = [jax.typeof(a).sharding for a in (x, *jax.tree.leaves(weight))]
    if not any(any(s.spec) for s in shardings):
        return None
    mesh = shardings[0].mesh
    outputs = shardings[1].spec[-1]
    whole = not any(shardings[0].spec[1:])
    whole &= all(s.mesh == mesh and s.spec[-1] == outputs for s in shardings[1:])
    whole &= not any(axis for s in shardings[1:] for axis in s.spec[:-1])
    # Automatic axes are the compiler's, and those of an outer `jax.shard_map` are taken.
    whole &= set(mesh.axis_names) == set(mesh.explicit_axes)
    return (mesh, shardings[0].spec[0], outputs) if whole else None


def on_shards(
    product: Callable[..., jax.Array],
    axes: tuple[Any, Any, Any],
    x: jax.Array,
    weight: Any,
    *vectors: Any,
) -> jax.Array:
    """`product(x, weight, *vectors)`, where each device multiplies its rows by its outputs.

    Args:
      product: of what one device holds.
      axes: from `explicit_axes`.
      x: (rows, inputs).
      weight: a tree of arrays whose last axis are the outputs.
      *vectors: (outputs,) or None.
    """
    mesh, rows, outputs = axes
    along = PartitionSpec(outputs)
    vectors = jax.tree.map(lambda a: jax.sharding.reshard(a, along), vectors)
    specs = jax.tree.map(lambda a: PartitionSpec(*[None] * (a.ndim - 1), outputs), weight)
    mapped = jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(
            PartitionSpec(rows, None),
            specs,
            *[None if v is None else along for v in vectors],
        ),
        out_specs=PartitionSpec(rows, outputs),
        # Pallas' interpreter does not know manual axes.
        check_vma=False,
    )
    y: jax.Array = mapped(x, weight, *vectors)
    return y


@functools.cache
def _primitive() -> Any:
    # Both load Pallas, which takes half a second.
    from jax.extend.core import Primitive
    from jax.interpreters import mlir, xla

    primitive = Primitive("nmjax_on_whole_operands")
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(lambda *operands, kernel, otherwise: kernel.out_avals[0])
    mlir.register_lowering(primitive, functools.partial(_lower, False))
    mlir.register_lowering(primitive, functools.partial(_lower, True), platform="tpu")
    return primitive


def _lower(on_tpu: bool, ctx: Any, *values: Any, kernel: Any, otherwise: Any) -> Any:
    from jax.extend.core import jaxpr_as_fun
    from jax.interpreters import mlir

    chosen = kernel if on_tpu and is_whole(ctx.module_context.axis_context) else otherwise
    if chosen is None:
        raise NotImplementedError(
            'implementation="tpu" runs on TPUs, on one device or inside jax.shard_map: the '
            "compiler cannot split its kernel over the automatic axes of a mesh"
        )
    return mlir.lower_fun(jaxpr_as_fun(chosen), multiple_results=True)(ctx, *values)
