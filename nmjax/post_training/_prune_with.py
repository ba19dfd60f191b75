"""Prunes a network with calibration data: all at once, or layer after layer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp

from nmjax.masks.arguments import check_number
from nmjax.plans import DenseLeaf, LeafPlan, Plan
from nmjax.post_training._admm import admm
from nmjax.post_training._alps import alps
from nmjax.post_training._scores import magnitude, ria, wanda
from nmjax.post_training._sparse_gpt import sparse_gpt
from nmjax.post_training.collecting import (
    REDUCE,
    Kind,
    Observations,
    check_all_met,
    collect,
    collected,
    inputs_of,
    traced_with,
)
from nmjax.post_training.compensation import compensated
from nmjax.post_training.observing.observation import Stages, stages
from nmjax.post_training.observing.product_inputs import layout_of
from nmjax.post_training.progress import tracked
from nmjax.post_training.statistics import Statistics
from nmjax.pruning import planned_leaves
from nmjax.trees.leaves import map_named, named_leaves

Params = TypeVar("Params")
Method = Callable[[Any, Plan, Statistics], Any]

METHODS: dict[str, tuple[Method, Kind]] = {
    "magnitude": (magnitude, "mean_square"),
    "wanda": (wanda, "mean_square"),
    "ria": (ria, "mean_square"),
    "sparse_gpt": (sparse_gpt, "gram"),
    "admm": (admm, "gram"),
    "alps": (alps, "gram"),
}


def prune_with(
    forward: Callable[..., Any],
    params: Params,
    plan: Plan,
    batches: Iterable[Any],
    method: str | Method = "sparse_gpt",
    sequential: bool = True,
    *,
    compensation: float = 0.0,
    dense: Params | None = None,
    finished: Collection[str] = (),
    on_finished: Callable[[Params, frozenset[str]], None] | None = None,
    progress: bool | None = None,
    memory_limit: int | None = None,
) -> Params:
    """Prunes a trained network with calibration data.

    If sequential, the weights are pruned in the order in which the program multiplies by them, each
    with statistics of the network as pruned so far, so that later layers make up for errors of
    earlier ones. Weights that meet the same activation, such as queries, keys and values, are
    pruned together; layers under `lax.scan` one after the other. Each step runs the network up to
    that layer on all batches, or through all layers of a scan. Otherwise one pass over the batches
    collects all statistics, which then must fit into memory together.

    With `compensation`, a layer does not aim at its own weights W but at W + compensation
    (G + ridge I)^-1 (C - G) W, which make up for errors of earlier layers: x are the layer's inputs
    before pruning, x' those in the network as pruned so far, G = mean x' x'^T and C = mean x' x^T.
    One half has been better than 0 and 1 for us. Each step then runs both networks, at twice the
    time and memory.

    Args:
      forward: the network's forward pass in evaluation, `forward(params, *inputs)`.
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`, with `forward=` so that the axes are the program's.
      batches: calibration data, as in `collect`.
      method: "magnitude", "wanda", "ria", "sparse_gpt", "admm", "alps", or a function
        (params, plan, statistics) -> params, which gets Gram matrices.
      sequential: whether statistics come from the network as pruned so far.
      compensation: the share of earlier errors that each layer tries to make up for, between 0 and
        1; it needs `sequential`.
      dense: with `compensation`, the parameters before pruning; by default `params`. Pass them to
        resume.
      finished: names that an interrupted run had finished, as `on_finished` got them; pass the
        parameters that it got as `params`.
      on_finished: called after each step with the parameters so far and the names of what is
        finished: those of leaves, and "name[i]" for layer i of a scan. Save both to resume.
      progress: whether to show progress; by default on a terminal.
      memory_limit: as in `collect`, for the statistics of one step.

    Returns:
      The same tree, pruned; leaves outside the plan are unchanged.

    Raises:
      TypeError: `method` is neither a name nor a function.
      ValueError: the method is unknown; `compensation` is not between 0 and 1; it or `finished`
        without `sequential`; and as in `collect`.
      NotImplementedError, MemoryError: as in `collect`.

    Source: layer after layer with statistics of the pruned network: Frantar and Alistarh,
    "SparseGPT", ICML 2023, section 4. Compensation: Arai and Ichikawa, "Quantization Error
    Propagation", 2025, with one share for all layers.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> forward = lambda params, x: x @ params["kernel"]
    >>> x = jnp.diag(jnp.array([1.0, 1.0, 4.0, 9.0]))
    >>> plan = nmjax.make_plan(params, "2:4", forward=forward, inputs=(x,))
    >>> prune_with(forward, params, plan, [x], "wanda")["kernel"].ravel().tolist()
    [0.0, 0.0, 2.0, 1.0]
    """
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if not (isinstance(method, str) or callable(method)):
        raise TypeError(f"method must be a name or a function, got {type(method).__name__}")
    prune, kind = METHODS[method] if isinstance(method, str) else (method, "gram")
    check_number("compensation", compensation)
    if not 0 <= compensation <= 1:
        raise ValueError(f"compensation must be between 0 and 1, got {compensation}")
    if compensation and not sequential:
        raise ValueError("compensation= needs sequential=True: one pass sees no earlier errors")
    if not sequential:
        if finished or on_finished:
            raise ValueError(
                "finished= and on_finished= need sequential=True: one pass has no steps to resume; "
                "pass start= to collect to continue its statistics"
            )
        statistics = collect(
            forward, params, batches, plan, kind, progress=progress, memory_limit=memory_limit
        )
        result: Params = prune(params, plan, statistics)
        return result
    before = None
    if compensation:
        prune, before = compensated(prune, compensation), params if dense is None else dense
    batches = list(batches)
    steps = list(_steps(*_order(forward, params, plan, batches, kind)))
    done = set(finished)
    _check_finished(done, steps)
    compiled: dict[tuple[str, ...], Observations] = {}
    for step in tracked(steps, "pruning", show=progress):
        if step.labels <= done:
            continue
        part = _only(plan, step.names)
        programs = compiled.setdefault(step.names, {})
        statistics = collected(
            programs, forward, params, batches, part, kind, None, False, memory_limit, before
        )
        params = _pruned(prune, params, part, statistics, step)
        done |= step.labels
        if on_finished is not None:
            on_finished(params, frozenset(done))
    return params


class _Step(NamedTuple):
    """Leaves that are pruned together.

    Attributes:
      names: of the leaves.
      axis: that a scan runs along; None for leaves that are pruned whole.
      layer: the layer along it.
    """

    names: tuple[str, ...]
    axis: int | None = None
    layer: int = 0

    @property
    def labels(self) -> set[str]:
        """The names of what the step finishes."""
        if self.axis is None:
            return set(self.names)
        return {f"{name}[{self.layer}]" for name in self.names}


def _order(
    forward: Callable[..., Any], params: Any, plan: Plan, batches: list[Any], kind: Kind
) -> tuple[Stages, dict[str, tuple[int, ...]]]:
    """The stages of a program, and the shapes of its planned leaves."""
    if not batches:
        raise ValueError("there are no batches; statistics need calibration data")
    leaves = planned_leaves(params, plan)
    layouts = {name: layout_of(plan[name], leaf.shape) for name, leaf in leaves.items()}
    traced = traced_with(forward, params, inputs_of(batches[0]), 0)
    found = stages(traced, layouts, REDUCE[kind])
    check_all_met(traced, layouts, found)
    return found, {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def _steps(found: Stages, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[_Step]:
    """The steps in order: of a scan, all stages of the first layer, then of the second, ..."""
    by_scan = [
        (scan, tuple(name for name in stage if found.scans.get(name) == scan))
        for stage in found.names
        for scan in dict.fromkeys(map(found.scans.get, stage))
    ]
    for number, group in itertools.groupby(by_scan, lambda stage: stage[0] and stage[0][0]):
        stages_of_group = list(group)
        if number is None:
            yield from (_Step(names) for _, names in stages_of_group)
            continue
        inside = [(scan[1], names) for scan, names in stages_of_group if scan]
        lengths = {name: shapes[name][axis] for axis, names in inside for name in names}
        for layer in range(max(lengths.values())):
            for axis, names in inside:
                left = tuple(name for name in names if layer < lengths[name])
                if left:
                    yield _Step(left, axis, layer)


def _check_finished(done: Collection[str], steps: Iterable[_Step]) -> None:
    unknown = sorted(set(done).difference(*(step.labels for step in steps)))
    if unknown:
        raise ValueError(
            f"finished= names {', '.join(unknown)}, which this plan does not prune; pass the names "
            "that on_finished got"
        )


def _only(plan: Plan, names: Collection[str]) -> Plan:
    """The part of a plan that is about these leaves."""

    def part(name: str, leaf: LeafPlan | DenseLeaf) -> LeafPlan | DenseLeaf:
        if name in names or isinstance(leaf, DenseLeaf):
            return leaf
        return DenseLeaf(leaf.shape, "pruned in another step")

    return Plan(tuple((name, part(name, leaf)) for name, leaf in plan.leaves), plan.score)


def _pruned(
    prune: Method, params: Params, part: Plan, statistics: Statistics, step: _Step
) -> Params:
    """The parameters after a step; of a scan, only one layer changes."""
    if step.axis is None:
        result: Params = prune(params, part, statistics)
        return result
    axis, layer = step.axis, slice(step.layer, step.layer + 1)
    leaves = named_leaves(params)
    slices, plans, means, rows = {}, [], {}, {}
    for name in step.names:
        leaf, whole = part[name], leaves[name]
        at = (slice(None),) * axis + (layer,)
        slices[name] = whole[at]
        shape = slices[name].shape[len(whole.shape) - len(leaf.shape) :]
        plans.append((name, dataclasses.replace(leaf, shape=shape)))
        # Statistics have the axes of the stack in front.
        place = (slice(None),) * layout_of(leaf, whole.shape).stack.index(axis) + (layer,)
        means[name], rows[name] = statistics.means[name][place], statistics.rows[name][place]
    found = prune(slices, Plan(tuple(plans), part.score), Statistics(means, rows))

    def replaced(name: str, leaf: Any) -> Any:
        if name not in found:
            return leaf
        at = (slice(None),) * axis + (layer,)
        return jnp.asarray(leaf).at[at].set(found[name])

    return map_named(replaced, params)
