"""Collects statistics of the activations that each planned weight meets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from nmjax.plans import Plan
from nmjax.post_training.observing.observation import Stages, observe, stages, unused
from nmjax.post_training.observing.product_inputs import Layout, layout_of
from nmjax.post_training.observing.totals import Total, Totals, zeros
from nmjax.post_training.progress import tracked
from nmjax.post_training.statistics import Statistics
from nmjax.pruning import planned_leaves
from nmjax.tracing.program import Trace, is_array, trace

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Kind = Literal["mean_square", "gram"]
# Means alone are for `output_shift`: methods could not tell them from mean squares.
Reduction = Literal["mean_square", "gram", "mean"]

_NETWORKS = "pruned and dense"


def collect(
    forward: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    plan: Plan,
    kind: Kind = "mean_square",
    *,
    start: Statistics | None = None,
    progress: bool | None = None,
    memory_limit: int | None = None,
) -> Statistics:
    """Runs a network on data, and averages what each planned weight is multiplied by.

        mean_square:  s_j = mean_t x_tj^2          gram:  G = mean_t x_t x_t^T

    over all rows x_t that meet the weight: tokens, pixels (patches for convolutions), steps of a
    recurrence. Layers under `lax.scan` and experts in a batch of matrices get one statistic each.
    The program is traced, so any forward pass works. Sums are in float32, Gram products in full
    precision. Batches that are sharded over a mesh are summed over it.

    Args:
      forward: the network's forward pass in evaluation, `forward(params, *inputs)`.
      params: parameters that fit the plan.
      batches: calibration data. A tuple is the inputs after the parameters; anything else is the
        only one. Each new shape compiles a program.
      plan: from `nmjax.make_plan`, with `forward=` so that the axes are the program's.
      kind: "mean_square" is enough for `wanda` and `ria`; the other methods need "gram".
      start: statistics of the same plan and kind to continue, for instance after an interruption.
      progress: whether to show progress and the time left; by default on a terminal.
      memory_limit: bytes that the statistics may take; by default what the device has left. They
        take 4 in^2 bytes per matrix for a Gram, twice while a batch is added.

    Returns:
      The statistics of all planned leaves.

    Raises:
      ValueError: there are no batches; a planned leaf is in no product (lists all of them); the
        inputs of a leaf are not finite (names the first in program order); `start` does not fit.
      NotImplementedError: the inputs of a leaf cannot be told apart.
      MemoryError: the statistics do not fit into memory; raised before the first batch.

    Warns:
      UserWarning: a Gram has fewer rows than inputs, so its rank is too low.

    >>> import nmjax
    >>> params = {"kernel": jnp.ones((4, 2))}
    >>> forward = lambda params, x: x @ params["kernel"]
    >>> x = jnp.array([[1.0, 2.0, 3.0, 0.0], [3.0, 0.0, 1.0, 0.0]])
    >>> plan = nmjax.make_plan(params, "2:4", forward=forward, inputs=(x,))
    >>> collect(forward, params, [x], plan)["kernel"].tolist()
    [[5.0, 2.0, 5.0, 0.0]]
    """
    if kind not in ("mean_square", "gram"):
        raise ValueError(f'kind must be "mean_square" or "gram", got {kind!r}')
    if not isinstance(batches, Iterable) or isinstance(batches, str | Mapping) or is_array(batches):
        raise TypeError(
            "batches must be a list or an iterator of batches, each the input of forward or a "
            f"tuple of its inputs; got {type(batches).__name__}"
        )
    return collected({}, forward, params, batches, plan, kind, start, progress, memory_limit)


Observations = dict[Any, "Observation"]


def collected(
    observations: Observations,
    forward: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    plan: Plan,
    kind: Reduction,
    start: Statistics | None = None,
    progress: bool | None = None,
    memory_limit: int | None = None,
    dense: Any = None,
) -> Statistics:
    """Like `collect`, with programs that earlier calls with the same plan and kind have compiled.

    Args:
      observations: compiled programs by shapes; new ones are added.
      forward: as in `collect`, like all that follow.
      params: parameters.
      batches: calibration data.
      plan: of the leaves to observe.
      kind: of statistics.
      start: statistics to continue.
      progress: whether to show progress.
      memory_limit: bytes.
      dense: parameters before pruning; with them the statistics are those of `_observe_pair`.
    """
    leaves = planned_leaves(params, plan)
    layouts = {name: layout_of(plan[name], leaf.shape) for name, leaf in leaves.items()}
    totals = None if start is None else _totals_of(start)
    for number, batch in enumerate(tracked(batches, f"{kind} statistics", show=progress)):
        inputs = inputs_of(batch)
        key = jax.tree.structure(inputs), *map(_described, jax.tree.leaves(inputs))
        if key not in observations:
            traced = traced_with(forward, params, inputs, number)
            observations[key] = Observation(traced, layouts, kind, memory_limit, dense is not None)
        totals = observations[key].add(totals, (params, inputs, dense), number)
    if totals is None:
        raise ValueError("there are no batches; statistics need calibration data")
    found = Statistics(
        {name: _mean(*totals[name]) for name in layouts},
        {name: totals[name].rows for name in layouts},
    )
    if kind == "gram":
        _warn_of_low_rank(found)
    return found


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """The arguments of a forward pass after the parameters."""
    return batch if isinstance(batch, tuple) else (batch,)


class Observation:
    """A program that adds the statistics of a batch of certain shapes."""

    def __init__(
        self,
        traced: Trace,
        layouts: Mapping[str, Layout],
        kind: Reduction,
        limit: int | None,
        is_pair: bool = False,
    ) -> None:
        reduce = _sum_beside_itself if is_pair else REDUCE[kind]
        self.found = stages(traced, layouts, reduce)
        count = len(traced.jaxpr.invars)
        check_all_met(traced, layouts, self.found)
        _check_memory(self.found, limit)

        def add(totals: Totals, arrays: list[jax.Array]) -> tuple[Totals, dict[str, jax.Array]]:
            arrays, dense = arrays[:count], arrays[count:]
            if is_pair:
                new = _observe_pair(traced, arrays, dense, layouts)
            else:
                new = observe(traced, arrays, layouts, reduce)
            finite = {name: jnp.isfinite(total.sum).all() for name, total in new.items()}
            return jax.tree.map(jnp.add, totals, new), finite

        self._add = jax.jit(add, donate_argnums=0)

    def add(self, totals: Totals | None, arguments: Any, number: int) -> Totals:
        """The totals after a batch."""
        if totals is None:
            totals = zeros(self.found.totals)
        _check_same(totals, self.found.totals)
        arrays = [leaf for leaf in jax.tree.leaves(arguments) if is_array(leaf)]
        totals, finite = self._add(totals, arrays)
        # Waiting for the flags of every batch costs little, and bad data shows at once.
        flags = jax.device_get(finite)
        for name in (name for stage in self.found.names for name in stage if not flags[name]):
            raise ValueError(
                f"batch {number}: the inputs of {name} hold NaN or infinity, or are too large to "
                "be squared in float32; it is the first such layer of the program. Check the batch "
                "and the weights of the layers before it"
            )
        return totals


def _observe_pair(
    traced: Trace,
    arrays: Sequence[jax.Array],
    dense: Sequence[jax.Array],
    layouts: Mapping[str, Layout],
) -> Totals:
    """Runs a network as pruned so far and as it was before, and compares what its weights meet.

    Args:
      traced: the program.
      arrays: its arguments, with the parameters as pruned so far.
      dense: its parameters before pruning.
      layouts: of the weights to observe, by name.

    Returns:
      Sums of the products of x', the inputs in the pruned network, with (x', x), those in both
      networks side by side: (*stack, groups, in, 2 in).
    """

    def reduce(rows: jax.Array) -> jax.Array:
        pruned, before = lax.all_gather(rows, _NETWORKS)
        return _sum_of_products(pruned, jnp.concatenate([pruned, before], axis=-1))

    def run(params: Sequence[jax.Array]) -> Totals:
        return observe(traced, [*params, *arrays[len(dense) :]], layouts, reduce)

    pairs = [jnp.stack(pair) for pair in zip(arrays, dense, strict=False)]
    totals = jax.vmap(run, axis_name=_NETWORKS)(pairs)
    # Both networks gather the same.
    return {name: Total(total.sum[0], total.rows[0]) for name, total in totals.items()}


def check_all_met(traced: Trace, names: Iterable[str], found: Stages) -> None:
    """Raises ValueError unless the program multiplies every planned leaf."""
    missing = [name for name in names if name not in found.totals]
    if missing:
        reasons = unused(traced, missing)
        lines = "\n".join(f"  {name}: {reasons[name]}" for name in missing)
        raise ValueError(
            "the program multiplies no activation by these planned leaves, so they have no "
            f"statistics:\n{lines}\nLeave them out of the plan: make_plan(..., exclude=)."
        )


def traced_with(
    forward: Callable[..., Any], params: Any, inputs: tuple[Any, ...], number: int
) -> Trace:
    """The traced program; an error says which batch it was."""
    try:
        return trace(forward, params, *inputs)
    except Exception as error:
        shapes = [getattr(leaf, "shape", leaf) for leaf in jax.tree.leaves(inputs)]
        error.add_note(
            f"This was forward(params, *inputs) with the inputs of batch {number}, of shapes "
            f"{shapes}."
        )
        raise


def _described(leaf: Any) -> Any:
    return (leaf.shape, str(leaf.dtype)) if is_array(leaf) else leaf


def _sum_of_squares(rows: Float[Array, "*stack rows in"]) -> Float[Array, "*stack in"]:
    return jnp.sum(rows * rows, axis=-2)


def _sum_of_products(
    rows: Float[Array, "*stack rows in"], others: Float[Array, "*stack rows on"] | None = None
) -> Float[Array, "*stack in on"]:
    # Full precision: solvers factorize the result, and TPUs would multiply in bfloat16.
    sharding = jax.typeof(rows).sharding
    is_sharded = any(axis is not None for axis in sharding.spec)
    return jnp.einsum(
        "...ti,...tj->...ij",
        rows,
        rows if others is None else others,
        precision=lax.Precision.HIGHEST,
        # On a mesh with explicit axes a sum over sharded rows must say where it goes: everywhere.
        out_sharding=NamedSharding(sharding.mesh, PartitionSpec()) if is_sharded else None,
    )


def _sum_beside_itself(rows: jax.Array) -> jax.Array:
    """Of the shape that `_observe_pair` gives."""
    return _sum_of_products(rows, jnp.concatenate([rows, rows], axis=-1))


def _sum(rows: Float[Array, "*stack rows in"]) -> Float[Array, "*stack in"]:
    return jnp.sum(rows, axis=-2)


REDUCE: dict[Reduction, Callable[[jax.Array], jax.Array]] = {
    "mean": _sum,
    "mean_square": _sum_of_squares,
    "gram": _sum_of_products,
}


def _mean(total: jax.Array, rows: jax.Array) -> jax.Array:
    return total / rows.reshape(rows.shape + (1,) * (total.ndim - rows.ndim)).clip(1)


def _totals_of(start: Statistics) -> Totals:
    if not isinstance(start, Statistics):
        raise TypeError(f"start must be Statistics, got {type(start).__name__}")
    return {
        name: Total(mean * jnp.expand_dims(rows, range(rows.ndim, mean.ndim)), rows + 0)
        for name, (mean, rows) in ((n, (start.means[n], start.rows[n])) for n in start)
    }


def _check_same(totals: Totals, expected: Mapping[str, Any]) -> None:
    got = {name: total.sum.shape for name, total in totals.items()}
    wanted = {name: total.sum.shape for name, total in expected.items()}
    if got != wanted:
        raise ValueError(
            f"statistics of shapes {got} cannot be continued with statistics of shapes {wanted}; "
            "start= must come from the same plan and kind, and all batches from one program"
        )


def _check_memory(found: Stages, limit: int | None) -> None:
    needed = 2 * sum(math.prod(total.sum.shape) * 4 for total in found.totals.values())
    limit = _free_memory() if limit is None else limit
    if limit is None or needed <= limit:
        return
    largest = max(found.totals, key=lambda name: math.prod(found.totals[name].sum.shape))
    raise MemoryError(
        f"the statistics take {needed / 2**30:.2f} GiB while a batch is added, more than the "
        f"{limit / 2**30:.2f} GiB that there are; the largest are those of {largest}, of shape "
        f"{found.totals[largest].sum.shape}. Plan fewer leaves at a time, as "
        'prune_with(sequential=True) does, or collect kind="mean_square"'
    )


def _free_memory() -> int | None:
    """Bytes that are free on the default device, if that is known."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    memory = Path("/proc/meminfo")
    if device.platform != "cpu" or not memory.exists():
        return None
    fields = dict(line.split(":", 1) for line in memory.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _warn_of_low_rank(found: Statistics) -> None:
    few = [
        f"  {name}: at most {int(rows)} of {found[name].shape[-2]}"
        for name, rows in ((n, np.min(np.asarray(found.rows[n]))) for n in found)
        if rows < found[name].shape[-2]
    ]
    if few:
        warnings.warn(
            "too little calibration data: the Gram matrices of these leaves have fewer rows than "
            "inputs, so their rank is low, and solvers rely on their ridge:\n" + "\n".join(few),
            stacklevel=3,
        )
