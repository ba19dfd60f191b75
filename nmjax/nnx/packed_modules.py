"""NNX modules on packed parameters."""

from __future__ import annotations

from typing import TypeVar

from flax import nnx

from nmjax.nnx.forward_pass import check_module
from nmjax.nnx.packed_layers import PackedParam, check_layers, holders, use_packed_products
from nmjax.nnx.variables import named_variables, with_variables
from nmjax.packed import packing
from nmjax.plans import Plan, check_plan
from nmjax.pruning import Masks

Model = TypeVar("Model", bound=nnx.Module)


def pack(model: Model, plan: Plan, masks: Masks | None = None) -> Model:
    """Returns a copy of a pruned module that runs on packed weights.

    `nnx.Linear`, `nnx.LinearGeneral` (and so attention), `nnx.Conv` and `nnx.Einsum` multiply by
    their packed kernels, inside `nnx.scan` and `nnx.vmap` too if the stack is along the first axis.
    Flax still does everything else in these layers. The copy shares nothing with `model`.

    Packed kernels are `nnx.Param`s of another type than before, so filters by a type of your own do
    not find them. They keep their metadata except for the sharding (`out_sharding`), which names
    axes of the dense weight: `nnx.get_partition_spec` gives `PartitionSpec()`.

    Weights rank differently after a cast: cast the values of packed weights, or cast before you
    prune. A LoRA adapter stays dense beside its packed layer. A kernel into which an adapter was
    merged is not sparse any more, so `pack` refuses it; prune it with the masks of the base.

    Args:
      model: an NNX module.
      plan: from `nmjax.nnx.make_plan`.
      masks: leaf name -> boolean array, which decides what is kept; by default the weights must be
        sparse already (`nmjax.nnx.prune`).

    Raises:
      TypeError: `model` is not an NNX module; a layer cannot multiply by packed weights: a layer of
        another class, or one with its own product, mask or `promote_dtype`; a kernel's variable
        has hooks, such as `on_get_value`, or its own `get_value`. The error lists all.
      ValueError: what `nmjax.pack` raises.

    >>> from nmjax.nnx.plans import make_plan
    >>> from nmjax.nnx.training import prune
    >>> import jax.numpy as jnp
    >>> model, x = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), jnp.ones((1, 8))
    >>> plan = make_plan(model, "2:4", inputs=(x,))
    >>> prune(model, plan)
    >>> packed = pack(model, plan)
    >>> type(packed.kernel.get_value()).__name__, bool(jnp.allclose(packed(x), model(x)))
    ('PackedNM', True)
    """
    check_module(model)
    check_plan(plan)
    params = nnx.state(model, nnx.Param)
    check_layers(model, plan)
    packed = named_variables(packing.pack(params, plan, masks))
    dense = named_variables(params)
    new = {name: PackedParam.in_place_of(dense[name], packed[name].get_value()) for name in plan}
    copied = with_variables(model, new, copy=True)
    for layer, _, _ in holders(copied, plan):
        use_packed_products(layer)
    return copied
