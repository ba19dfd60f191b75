"""What pruning does to the mean output of each layer, which a bias can make up for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from nmjax.plans import Plan
from nmjax.post_training.collecting import collected
from nmjax.post_training.matrices import Matrices
from nmjax.pruning import planned_leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def output_shift(
    forward: Callable[..., Any],
    params: Any,
    pruned: Any,
    batches: Iterable[Any],
    plan: Plan,
    *,
    progress: bool | None = None,
) -> dict[str, Float[Array, "*stack outputs"]]:
    """What to add to each layer's bias, so that pruning does not move its mean output.

        shift = (W - V)^T mean_t x_t

    with the weights W before and V after pruning, and the layer's inputs x in the dense network.
    This is called bias correction. It matters where inputs have a mean, as after a ReLU or a GELU.
    Methods that use Gram matrices keep most of the mean already.

    Args:
      forward: the network's forward pass in evaluation, `forward(params, *inputs)`.
      params: parameters before pruning, which fit the plan.
      pruned: parameters after pruning.
      batches: calibration data, as in `collect`.
      plan: of the pruned leaves.
      progress: whether to show progress; by default on a terminal.

    Returns:
      leaf name -> the shift: the axes of the leaf's stack in order, then its output axes, as the
      bias of such a layer has them.

    Raises:
      ValueError: the two trees do not fit the plan; and as in `collect`.
      NotImplementedError: as in `collect`.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
    ICCV 2019, section 4.2, with measured means.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> forward = lambda params, x: x @ params["kernel"]
    >>> x = jnp.array([[0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 3.0, 1.0]])
    >>> plan = nmjax.make_plan(params, "2:4", forward=forward, inputs=(x,))
    >>> shift = output_shift(forward, params, nmjax.prune(params, plan), [x], plan)
    >>> shift["kernel"].tolist()
    [6.0]
    """
    before, after = planned_leaves(params, plan), planned_leaves(pruned, plan)
    means = collected({}, forward, params, batches, plan, "mean", progress=progress)
    found = {}
    for name, leaf in plan.items():
        view = Matrices(leaf, before[name].shape, means.rows[name].shape[-1])
        w, v = (view.of(x[name].astype(jnp.float32)) for x in (before, after))
        moved = jnp.einsum("...gi,...gio->...go", means[name], w - v, precision="highest")
        outputs = tuple(leaf.shape[axis] for axis in leaf.output_axes)
        found[name] = moved.reshape(*moved.shape[:-2], *outputs)
    return found
