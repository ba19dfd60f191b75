"""Makes plans: selects leaves by path rules, and finds the axes of each one.

The axes are those that the program sums over, if there is a forward pass to read them off. Without
one, they are those of known layers. nmjax does not guess: leaves with unknown axes are an error.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nmjax.layouts import layouts
from nmjax.layouts.axes import Axes, GivenAxes, Unknown
from nmjax.masks.scores import Score, check_score, magnitude
from nmjax.patterns import Pattern, parse_pattern
from nmjax.patterns.pattern import LeafPlan
from nmjax.plans import DenseLeaf, Plan, check_plan
from nmjax.selection import FoundAxes, PlannedLeaf, Selection, by_rule, moved_apart
from nmjax.tracing.program import described, is_array, read_program
from nmjax.tracing.uses import Uses
from nmjax.trees.equinox_layers import layer_classes
from nmjax.trees.leaves import named_leaves
from nmjax.trees.modules import check_no_module
from nmjax.trees.path_rules import PathRules, as_rules, check_rules

Choice = Literal["error", "dense"]


def make_plan(
    params: Any,
    pattern: str | Pattern,
    *,
    exclude: PathRules = (),
    include: PathRules | None = None,
    rules: Mapping[str, str | Pattern | None] | None = None,
    axes: Mapping[str, GivenAxes] | None = None,
    forward: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
    on_indivisible: Choice = "error",
    on_unknown: Choice = "error",
    score: Score = magnitude,
) -> Plan:
    """Decides which leaves of `params` become sparse, with which pattern, and along which axes.

    With `forward`, the axes of a leaf are those that its product in the traced program sums over,
    and a leaf in no product stays dense. Without it, they are those of the layers of Flax, Equinox,
    Haiku, and PyTorch, wherever names and shapes are unambiguous.

    Path rules are regular expressions that match anywhere in a leaf's name (`"a/b/kernel"`).
    Biases, normalizations, embeddings, and depthwise convolutions stay dense by default.

    Args:
      params: parameters, or anything with the same tree, shapes, and dtypes (`jax.eval_shape`):
        dicts, FrozenDicts, dataclasses, boxed Flax leaves, NNX states, Equinox modules.
      pattern: pattern of every leaf that `rules` do not mention, such as `"2:4"`, `NM(2, 4)`, or
        `"1x16@0.5"`.
      exclude: path rules of leaves to leave dense.
      include: if given, only leaves that match these path rules can become sparse.
      rules: path rule -> the pattern of the leaves that match, or None to leave them dense. The
        first rule that matches wins.
      axes: path rule -> the reduction axes of the leaves that match. They override what nmjax
        finds, with a warning if they differ from those of the program, and such leaves always
        count as weights. All other axes count as outputs; use
        `nmjax.Axes` to say which are outputs and which are taps, as blocks need for weights with
        more than two axes.
      forward: the network's forward pass, `forward(params, *inputs)`. It is traced, not run.
      inputs: the arguments of `forward` after the parameters, in a tuple: arrays,
        ShapeDtypeStructs, or shapes of float32 arrays. For token ids pass
        `jax.ShapeDtypeStruct(shape, jnp.int32)`.
      on_indivisible: what to do with a leaf that does not divide into whole groups or blocks:
        `"error"`, or `"dense"` to leave it dense and record the reason.
      on_unknown: what to do with a leaf whose axes are not certain: `"error"`, or `"dense"`.
      score: importance of each weight, a function of the weight array. A block's importance is the
        sum over its weights, which is its L1 norm by default. Pass a named function rather than a
        new lambda each time: two plans are equal, and share the jit cache, only if the score is the
        same object.

    Raises:
      TypeError: a leaf to become sparse does not have a floating dtype; a pattern, path rule, or
        axis has the wrong type; `inputs` is not a tuple; `params` is a Flax module.
      ValueError: the tree has no leaves; a pattern does not parse; a path rule is not a regular
        expression or matches no leaf; a rule in `rules` has no effect; a leaf does not have the
        given axes, or its pattern needs axes that the shape does not determine; leaves have unknown
        axes, or do not divide into whole groups or blocks (the error lists all of them); no leaf
        becomes sparse; `forward` without `inputs`, or the other way around.

    >>> params = {"Dense_0": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}}
    >>> plan = make_plan(params, "2:4")
    >>> plan["Dense_0/kernel"].reduction_axes
    (-2,)
    >>> plan.dense
    {'Dense_0/bias': 'bias'}

    >>> params = {"q_proj": jnp.zeros((16, 4, 8))}  # (embed, heads, head size)
    >>> forward = lambda params, x: jnp.einsum("btd,dnh->btnh", x, params["q_proj"])
    >>> make_plan(params, "2:4", forward=forward, inputs=((1, 10, 16),))["q_proj"].reduction_axes
    (-3,)
    """
    for argument, value in (("on_indivisible", on_indivisible), ("on_unknown", on_unknown)):
        if value not in ("error", "dense"):
            raise ValueError(f'{argument} must be "error" or "dense", got {value!r}')
    if isinstance(params, str | Pattern):
        raise TypeError(
            f"expected parameters, got {params!r}; if it is the pattern, swap the two arguments: "
            'nmjax.make_plan(params, "2:4")'
        )
    check_no_module(params)
    check_score(score)
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError(
            f"the parameter tree has no leaves to plan; got {type(params).__name__}. Pass a tree "
            'of arrays, as in nmjax.make_plan(params, "2:4")'
        )
    choice = Selection(
        pattern=parse_pattern(pattern),
        exclude=as_rules(exclude),
        include=None if include is None else as_rules(include),
        rules={
            rule: p if p is None else parse_pattern(p)
            for rule, p in by_rule(rules, "rules").items()
        },
        axes=by_rule(axes, "axes"),
    )
    check_rules((*choice.exclude, *(choice.include or ()), *choice.rules, *choice.axes), leaves)
    found = _find_axes(params, leaves, forward, inputs)
    planned = {name: choice.plan_leaf(name, leaf, found[name]) for name, leaf in leaves.items()}
    _report_overridden(planned, found)
    if on_unknown == "error":
        _check_known(planned, traced=forward is not None)
    choice.check_rules_apply(planned)
    # After the rules, so that excluded leaves need not divide.
    misfits = _misfits(planned)
    planned = _settle_indivisible(planned, misfits, on_indivisible)
    _check_floating(planned, leaves)
    if not any(isinstance(leaf, LeafPlan) for leaf in planned.values()):
        is_unknown = any(getattr(leaf, "is_unknown", False) for leaf in planned.values())
        advice = "\nPass forward= and inputs=, or axes=, to make_plan." if is_unknown else ""
        if misfits:
            advice += (
                f"\n{choice.pattern} does not divide the sizes of these leaves: choose a pattern "
                'with smaller groups or blocks, such as "1:2", or pad the layers.'
            )
        raise ValueError(f"no leaf becomes sparse:\n{_lines(planned)}{advice}")
    return Plan(tuple(planned.items()), score)


def check_axes(plan: Plan, forward: Callable[..., Any], params: Any, *inputs: Any) -> None:
    """Raises ValueError unless the plan's axes are those that the program sums over.

    Leaves that the program does not use, or that cannot be followed to a product, are not checked.

    Args:
      plan: from `make_plan`.
      forward: the network's forward pass, `forward(params, *inputs)`; it is traced, not run.
      params: its parameters: arrays or ShapeDtypeStructs.
      *inputs: its inputs: arrays, ShapeDtypeStructs, or shapes of float32 arrays.

    Raises:
      ValueError: a planned leaf takes part in products along other axes, or in none (the error
        lists all such leaves); the plan names a leaf that `params` does not have; no inputs.
      TypeError: `plan` is not a plan; the inputs are the sizes of one shape.

    >>> params = {"kernel": jnp.zeros((16, 8))}  # stored as (out, in)
    >>> forward = lambda params, x: x @ params["kernel"].T
    >>> check_axes(make_plan(params, "2:4"), forward, params, (1, 8))
    Traceback (most recent call last):
        ...
    ValueError: the plan and the program disagree about these leaves:
      kernel (16, 8): planned along -2, but the program sums over -1
    Make the plan from the program: make_plan(..., forward=, inputs=).
    """
    check_plan(plan)
    missing = sorted(plan.keys() - named_leaves(params).keys())
    if missing:
        raise ValueError(f"the plan names leaves that params does not have: {missing}")
    uses = _read_uses(forward, params, inputs)
    wrong = {name: _disagreement(leaf, uses[name]) for name, leaf in plan.items() if name in uses}
    lines = [f"  {name} {plan[name].shape}: {text}" for name, text in wrong.items() if text]
    if lines:
        raise ValueError(
            "the plan and the program disagree about these leaves:\n"
            + "\n".join(lines)
            + "\nMake the plan from the program: make_plan(..., forward=, inputs=)."
        )


def _read_uses(forward: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> dict[str, Uses]:
    if len(inputs) > 1 and all(type(size) is int for size in inputs):
        raise TypeError(
            f"inputs= has one entry for each argument of forward; for one array of shape {inputs}, "
            f"write inputs=({tuple(inputs)},)"
        )
    if not any(map(is_array, jax.tree.leaves(tuple(map(described, inputs))))):
        raise ValueError(
            "the network's inputs are needed to distinguish activations from weights: pass them as "
            "arguments, as in inputs=(x,), instead of closing over them"
        )
    with _order_explained(forward):
        return read_program(forward, params, *inputs).uses


@contextlib.contextmanager
def _order_explained(forward: Callable[..., Any]) -> Iterator[None]:
    """Adds to an error what `forward` is called with, unless it names its argument `params`."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(TypeError, ValueError):  # Some callables have no signature.
            if next(iter(inspect.signature(forward).parameters), "") != "params":
                error.add_note(
                    "forward is called as forward(params, *inputs): its first argument must be "
                    "the parameters."
                )
        raise


def _disagreement(leaf: LeafPlan, uses: Uses) -> str:
    """How a plan differs from the uses of its leaf; empty if it does not."""
    if len(uses.shape) < len(leaf.shape) or uses.shape[-len(leaf.shape) :] != leaf.shape:
        return f"planned for shape {leaf.shape}, but it has shape {uses.shape}"
    products = [c for c in uses.contractions if c.reduction]
    placed = [leaf.pattern.place(c.axes) for c in products]
    if not placed:
        unclear = isinstance(uses.axes(), Unknown) or not uses.is_used
        return "" if unclear else f"planned along {leaf.span}, but it is {uses.axes()}"
    if leaf.pattern.needs_taps:
        agreeing = [axes for axes in placed if leaf.axes == axes]
    else:
        agreeing = [axes for axes in placed if leaf.reduction_axes == axes.reduction]
    # Where products disagree, the user decides.
    if agreeing and leaf.source == "given":
        return ""
    if len(agreeing) == len(placed):
        return moved_apart(leaf, uses)
    sums = " and ".join(", ".join(map(str, axes.reduction)) for axes in dict.fromkeys(placed))
    return f"planned along {leaf.span}, but the program sums over {sums}"


def _find_axes(
    params: Any,
    leaves: Mapping[str, Any],
    forward: Callable[..., Any] | None,
    inputs: Sequence[Any],
) -> dict[str, FoundAxes]:
    """Leaf name -> its axes or why it has none, and where they come from."""
    shapes = {name: tuple(getattr(leaf, "shape", ())) for name, leaf in leaves.items()}
    known = layouts(shapes, layer_classes(params))
    if not isinstance(inputs, tuple | list):
        raise TypeError(
            "inputs= must be a tuple of the arguments that forward takes after the parameters, "
            f"such as inputs=(x,); got {type(inputs).__name__}"
        )
    if forward is None:
        if inputs:
            raise ValueError("inputs= are the arguments of forward=; pass forward= too")
        return {name: FoundAxes(axes, "known layer") for name, axes in known.items()}
    uses = _read_uses(forward, params, inputs)
    found: dict[str, FoundAxes] = {}
    for name, by_name in known.items():
        axes = uses[name].axes() if name in uses else "not an array"
        # "bias" says more than that the leaf is in no product. A vector has no axes to choose.
        is_vector = len(shapes[name]) < 2
        in_product = name in uses and uses[name].contractions and not is_vector
        if isinstance(by_name, str) and (is_vector or (isinstance(axes, str) and not in_product)):
            axes = by_name
        found[name] = FoundAxes(axes, "program", uses.get(name))
    return found


def _check_known(planned: Mapping[str, PlannedLeaf], *, traced: bool) -> None:
    """Raises one ValueError that lists all leaves with unknown axes."""
    unknown = {n: leaf for n, leaf in planned.items() if getattr(leaf, "is_unknown", False)}
    if not unknown:
        return
    read = "" if traced else "pass forward= and inputs= to read the axes off your program, "
    raise ValueError(
        "these leaves have unknown axes:\n"
        + _lines(unknown).replace("unknown axes: ", "")
        + f"\nTo fix this, {read}give their reduction axes in axes={{path rule: axes}}, or "
        'list them in exclude= to leave them dense. on_unknown="dense" leaves all of them dense.'
    )


def _report_overridden(planned: Mapping[str, PlannedLeaf], found: Mapping[str, FoundAxes]) -> None:
    """Warns if given axes replace others that the program shows for certain."""
    lines = [
        f"  {name} {leaf.shape}: given {leaf.span}, but the program sums over {span}"
        for name, leaf in planned.items()
        if isinstance(leaf, LeafPlan)
        and leaf.source == "given"
        and found[name].source == "program"
        and isinstance(axes := found[name].axes, Axes)
        and axes.reduction
        and leaf.pattern.place(axes).reduction != leaf.reduction_axes
        for span in [", ".join(map(str, axes.reduction))]
    ]
    if lines:
        warnings.warn(
            "axes= replaces the axes of the program for these leaves:\n"
            + "\n".join(lines)
            + "\nDrop them from axes= to take the axes of the program.",
            stacklevel=3,
        )


def _misfits(planned: Mapping[str, PlannedLeaf]) -> dict[str, str]:
    """Leaf name -> why it does not divide into whole groups or blocks."""
    return {
        name: leaf.misfit
        for name, leaf in planned.items()
        if isinstance(leaf, LeafPlan) and leaf.misfit is not None
    }


def _settle_indivisible(
    planned: Mapping[str, PlannedLeaf], complaints: Mapping[str, str], on_indivisible: str
) -> dict[str, PlannedLeaf]:
    """Leaves indivisible leaves dense, or raises one ValueError that lists all of them."""
    if complaints and on_indivisible == "error":
        raise ValueError(
            "these leaves do not divide into whole groups or blocks:\n"
            + "\n".join(
                f"  {name} {planned[name].shape}: {complaint} (axes {planned[name].span})"  # type: ignore[union-attr]
                for name, complaint in complaints.items()
            )
            + '\nList them in exclude=, or pass on_indivisible="dense" to leave them dense.'
        )
    return {
        name: DenseLeaf(leaf.shape, complaints[name]) if name in complaints else leaf
        for name, leaf in planned.items()
    }


def _check_floating(planned: Mapping[str, PlannedLeaf], leaves: Mapping[str, Any]) -> None:
    wrong = {
        name: leaves[name].dtype
        for name, leaf in planned.items()
        if isinstance(leaf, LeafPlan) and not jnp.issubdtype(leaves[name].dtype, jnp.floating)
    }
    if wrong:
        raise TypeError(
            "only weights with a floating dtype can become sparse, but\n"
            + "\n".join(f"  {name} has dtype {dtype}" for name, dtype in wrong.items())
            + "\nList them in exclude=, or convert them."
        )


def _lines(leaves: Mapping[str, PlannedLeaf]) -> str:
    """A line for each dense leaf, with its shape and reason."""
    dense = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, DenseLeaf)}
    return "\n".join(f"  {name} {leaf.shape}: {leaf.reason}" for name, leaf in dense.items())
