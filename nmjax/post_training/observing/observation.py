"""Runs a traced program and sums up what its products multiply by each planned weight.

The tracer knows which weight each value of the program comes from. The observer runs the program on
numbers with that knowledge beside them, through calls, scans, loops and branches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.post_training.observing.product_inputs import Layout, UnsupportedUseError, read_inputs
from nmjax.post_training.observing.totals import Total, Totals, added, in_whole_stack, zeros
from nmjax.tracing.products import Product, read_product
from nmjax.tracing.program import Trace, WeightReader, arguments_of, weight_sides
from nmjax.tracing.uses import Uses
from nmjax.tracing.values import CONSTANT, Value
from nmjax.tracing.walk import called_program, is_variable, opened, parts_of_scan, shape_of

if TYPE_CHECKING:
    from jax.extend import core

Reduce = Callable[[jax.Array], jax.Array]


class Stages(NamedTuple):
    """What an observation will find.

    Attributes:
      names: of the weights, in the order of their first products, as stages.
      scans: name -> number of the outermost scan that runs over it, and the axis.
      totals: shapes and dtypes of the totals.
    """

    names: list[list[str]]
    scans: dict[str, tuple[int, int]]
    totals: dict[str, Any]


def observe(
    traced: Trace, arrays: Sequence[jax.Array], layouts: Mapping[str, Layout], reduce: Reduce
) -> Totals:
    """Runs a program and sums up the inputs of its weights. Can be jitted.

    Args:
      traced: the program.
      arrays: its arguments.
      layouts: of the weights to observe, by name.
      reduce: sums (*stack, groups, rows, in) up over the rows.

    Returns:
      The totals of the weights that the program multiplies.

    Raises:
      NotImplementedError: the inputs of a weight cannot be told apart; names the weight.
    """
    return _observed(traced, arrays, layouts, reduce).totals


def stages(traced: Trace, layouts: Mapping[str, Layout], reduce: Reduce) -> Stages:
    """What `observe` will return, without running the program.

    Weights that are multiplied by the same array one after the other, as queries, keys, and values,
    are one stage.
    """
    names: list[list[str]] = []
    scans: dict[str, tuple[int, int]] = {}

    def run(*arrays: jax.Array) -> Totals:
        observer = _observed(traced, arrays, layouts, reduce)
        for _, stage in itertools.groupby(observer.met.items(), lambda item: id(item[1])):
            names.append([name for name, _ in stage])
        scans.update(observer.scans)
        return observer.totals

    avals: list[Any] = [variable.aval for variable in traced.jaxpr.invars]
    given = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    totals = jax.eval_shape(run, *given)
    return Stages(names, scans, totals)


def _observed(
    traced: Trace, arrays: Sequence[jax.Array], layouts: Mapping[str, Layout], reduce: Reduce
) -> _Observer:
    shapes = dict(zip(traced.names, map(shape_of, traced.jaxpr.invars), strict=False))
    observer = _Observer(WeightReader(shapes), layouts, reduce)
    observer.run(traced.jaxpr, traced.constants, arguments_of(traced), arrays)
    return observer


def unused(traced: Trace, names: Sequence[str]) -> dict[str, str]:
    """Why these weights are in no product that can be observed, by name."""
    shapes = dict(zip(traced.names, map(shape_of, traced.jaxpr.invars), strict=False))
    reader = WeightReader(shapes)
    reader.walk(traced.jaxpr, arguments_of(traced))
    return {name: _reason(reader.uses.get(name)) for name in names}


def _reason(uses: Uses | None) -> str:
    if uses is None:
        return "not in the parameters"
    found = uses.axes()
    if isinstance(found, str):
        return found
    return getattr(found, "reason", "its product is inside an operation that is not supported")


class _Observer:
    """Interprets a program on numbers, with what the tracer knows of each value.

    Attributes:
      totals: of the weights met so far.
      met: for each of them, the first array that it was multiplied by.
      scans: number of the outermost scan that runs over a weight, and the weight's axis.
    """

    def __init__(
        self,
        reader: WeightReader,
        layouts: Mapping[str, Layout],
        reduce: Reduce,
        scanned: frozenset[tuple[str, int]] = frozenset(),
        met: dict[str, Any] | None = None,
    ) -> None:
        self.totals: Totals = {}
        self.met = {} if met is None else met
        self.scans: dict[str, tuple[int, int]] = {}
        self._number = 0
        self._reader = reader
        self._layouts = layouts
        self._reduce = reduce
        # (name, axis) of stacks of which an enclosing scan passes one matrix after the other.
        self._scanned = scanned

    def run(
        self, jaxpr: core.Jaxpr, constants: Sequence[Any], known: Sequence[Value], arrays: Any
    ) -> list[jax.Array]:
        """Runs a program on its arguments, and on what is known of them."""
        values: dict[Any, tuple[Value, Any]] = {
            **{v: (CONSTANT, x) for v, x in zip(jaxpr.constvars, constants, strict=True)},
            **{v: (k, x) for v, k, x in zip(jaxpr.invars, known, arrays, strict=True)},
        }

        def value_of(operand: Any) -> tuple[Value, Any]:
            if is_variable(operand):
                return values[operand]
            return self._reader.constant(operand), operand.val

        for equation in jaxpr.eqns:
            operands = list(map(value_of, equation.invars))
            meanings = [meaning for meaning, _ in operands]
            results = self._evaluate(jaxpr, equation, meanings, [x for _, x in operands])
            meanings = self._reader.interpret(equation, meanings, 1)
            values |= zip(equation.outvars, zip(meanings, results, strict=True), strict=True)
        return [value_of(operand)[1] for operand in jaxpr.outvars]

    def _evaluate(
        self, jaxpr: core.Jaxpr, equation: core.JaxprEqn, known: list[Value], arrays: list[Any]
    ) -> list[Any]:
        name = equation.primitive.name
        if any(self._layouts.keys() & value.weights for value in known):
            if name == "scan":
                return self._scan(equation, known, arrays)
            if name == "while":
                return self._while(equation, known, arrays)
            if name == "cond":
                return self._cond(equation, known, arrays)
            called = None if name == "shard_map" else called_program(equation)
            if called is not None:
                return self.run(opened(called), _constants(called), known, arrays)
            product = read_product(equation)
            if product is not None:
                self._observe(equation, product, known, arrays)
        return _bind(jaxpr, equation, arrays)

    def _observe(
        self, equation: core.JaxprEqn, product: Product, known: list[Value], arrays: list[Any]
    ) -> None:
        sides = weight_sides(product, known[:2])
        if len(sides) != 1 or not product.sides[sides[0]].is_followed:
            return
        (side,) = sides
        if known[1 - side].is_one_hot:  # It looks entries up.
            return
        for view in known[side].views:
            layout = self._layouts.get(view.leaf)
            if layout is None or not view.keeps_zeros:
                continue
            try:
                found = read_inputs(equation, product, side, view, arrays[1 - side], layout)
                if found is None:
                    continue
                if any((view.leaf, axis) in self._scanned for axis in found.stack):
                    raise UnsupportedUseError("a scan passes it both whole and matrix by matrix")
            except UnsupportedUseError as error:
                raise NotImplementedError(
                    f"{view.leaf} {layout.shape}: {error}. Or leave it out of the plan (exclude=)"
                ) from None
            self.met.setdefault(view.leaf, arrays[1 - side])
            rows = found.rows.astype(jnp.float32)
            count = jnp.full(rows.shape[:-2], rows.shape[-2], jnp.float32)
            total = Total(self._reduce(rows), count)
            self._add(view.leaf, total, found.places, found.stack)

    def _add(
        self,
        leaf: str,
        total: Total,
        places: Mapping[int, tuple[int, int]],
        present: Sequence[int],
    ) -> None:
        """Adds a total of some matrices of a stack to those of the whole stack."""
        layout = self._layouts[leaf]
        stack = [axis for axis in layout.stack if (leaf, axis) not in self._scanned]
        sizes = {axis: layout.shape[axis] for axis in stack}
        whole = in_whole_stack(total, sizes, places, present)
        before = self.totals.get(leaf)
        if before is None:
            self.totals[leaf] = whole
        elif before.sum.shape != whole.sum.shape:
            raise NotImplementedError(
                f"{leaf} {layout.shape}: its products have different numbers of feature groups; "
                "leave it out of the plan (exclude=)"
            )
        else:
            self.totals[leaf] = added(before, whole)

    def _inside(self, scanned: Sequence[tuple[str, int]] = ()) -> _Observer:
        both = self._scanned.union(scanned)
        return _Observer(self._reader, self._layouts, self._reduce, both, self.met)

    def _scan(self, equation: core.JaxprEqn, known: list[Value], arrays: list[Any]) -> list[Any]:
        """A scan; of stacks that it passes matrix by matrix, the totals are stacked."""
        parameters, closed = equation.params, equation.params["jaxpr"]
        constants, carried = parts_of_scan(parameters)
        end = constants + carried
        shapes = map(shape_of, equation.invars[end:])
        entries = list(map(self._reader.entry, known[end:], shapes))
        carry = self._reader.settle(
            known[constants:end],
            lambda c: self._reader.walk(opened(closed), [*known[:constants], *c, *entries], None)[
                :carried
            ],
        )
        inner = [*known[:constants], *carry, *entries]
        places = self._passed_one_by_one(known[end:], [x.shape for x in arrays[end:]])
        self._number += 1
        self.scans |= {leaf: (self._number, axis) for leaf, (axis, *_) in places.items()}

        def body(carry: Any, xs: Any) -> tuple[list[Any], Totals]:
            inside = self._inside([(leaf, axis) for leaf, (axis, *_) in places.items()])
            operands = [*arrays[:constants], *carry, *xs]
            return inside.run(opened(closed), _constants(closed), inner, operands), inside.totals

        def step(state: Any, xs: Any) -> Any:
            carry, totals = state
            results, found = body(carry, xs)
            kept = {leaf: added(totals[leaf], found[leaf]) for leaf in totals}
            stacked = {leaf: total for leaf, total in found.items() if leaf in places}
            return (results[:carried], kept), (results[carried:], stacked)

        first = [jax.tree.map(lambda x: x[0], x) for x in arrays[end:]]
        found = jax.eval_shape(body, arrays[constants:end], first)[1]
        start = {leaf: zeros(total) for leaf, total in found.items() if leaf not in places}
        (carry_out, totals), (stacks, stacked) = lax.scan(
            step,
            (arrays[constants:end], start),
            arrays[end:],
            length=parameters["length"],
            reverse=parameters["reverse"],
            unroll=parameters["unroll"],
        )
        for leaf in found:
            if leaf in totals:
                self._merge(leaf, totals[leaf])
            else:
                self._add_stacked(leaf, stacked[leaf], *places[leaf])
        return [*carry_out, *stacks]

    def _passed_one_by_one(
        self, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
    ) -> dict[str, tuple[int, int, int]]:
        """Axis, first matrix, and number of matrices of each weight that a scan runs over."""
        places: dict[str, tuple[int, int, int]] = {}
        for value, shape in zip(values, shapes, strict=True):
            for view in value.views:
                axes = {piece.axis for piece in view.axes[0]} - {None}
                if view.leaf not in self._layouts or not axes:
                    continue
                layout, axis = self._layouts[view.leaf], view.axes[0][0].axis
                start = None if axis is None else view.order(axis).start
                if len(view.axes[0]) > 1 or axis not in layout.stack or start is None:
                    raise NotImplementedError(
                        f"{view.leaf} {layout.shape}: a scan runs over parts of it that are not "
                        "matrices of a stack in order; leave it out of the plan (exclude=)"
                    )
                place = (axis, start, shape[0])
                if places.setdefault(view.leaf, place) != place:
                    raise NotImplementedError(
                        f"{view.leaf} {layout.shape}: a scan passes different matrices of it in "
                        "one step; leave it out of the plan (exclude=)"
                    )
        return places

    def _add_stacked(self, leaf: str, total: Total, axis: int, start: int, length: int) -> None:
        layout = self._layouts[leaf]
        outer = [a for a in layout.stack if (leaf, a) not in self._scanned]
        moved = Total(*(jnp.moveaxis(part, 0, outer.index(axis)) for part in total))
        places = {a: (0, layout.shape[a]) for a in outer} | {axis: (start, length)}
        self._add(leaf, moved, places, outer)

    def _merge(self, leaf: str, total: Total) -> None:
        before = self.totals.get(leaf)
        self.totals[leaf] = total if before is None else added(before, total)

    def _while(self, equation: core.JaxprEqn, known: list[Value], arrays: list[Any]) -> list[Any]:
        parameters = equation.params
        test, closed = parameters["cond_jaxpr"], parameters["body_jaxpr"]
        for_test = parameters["cond_nconsts"]
        end = for_test + parameters["body_nconsts"]
        carry = self._reader.settle(
            known[end:],
            lambda c: self._reader.walk(opened(closed), [*known[for_test:end], *c], None),
        )

        def body(state: Any) -> tuple[list[Any], Totals]:
            inside = self._inside()
            operands = [*arrays[for_test:end], *state]
            meanings = [*known[for_test:end], *carry]
            return inside.run(opened(closed), _constants(closed), meanings, operands), inside.totals

        def step(state: Any) -> Any:
            results, found = body(state[0])
            return results, {leaf: added(state[1][leaf], found[leaf]) for leaf in found}

        def goes_on(state: Any) -> Any:
            operands = [*arrays[:for_test], *state[0]]
            meanings = [*known[:for_test], *carry]
            return self._inside().run(opened(test), _constants(test), meanings, operands)[0]

        found = jax.eval_shape(body, arrays[end:])[1]
        start = {leaf: zeros(total) for leaf, total in found.items()}
        results, totals = lax.while_loop(goes_on, step, (arrays[end:], start))
        for leaf in found:
            self._merge(leaf, totals[leaf])
        return list(results)

    def _cond(self, equation: core.JaxprEqn, known: list[Value], arrays: list[Any]) -> list[Any]:
        def branch(closed: Any) -> Callable[..., tuple[list[Any], Totals]]:
            def run(*operands: Any) -> tuple[list[Any], Totals]:
                inside = self._inside()
                results = inside.run(opened(closed), _constants(closed), known[1:], operands)
                return results, inside.totals

            return run

        branches = [branch(closed) for closed in equation.params["branches"]]
        found: Totals = {}
        for run in branches:
            found = jax.eval_shape(run, *arrays[1:])[1] | found

        def filled(run: Callable[..., Any]) -> Callable[..., Any]:
            def run_filled(*operands: Any) -> Any:
                results, totals = run(*operands)
                return results, {leaf: totals.get(leaf, zeros(found[leaf])) for leaf in found}

            return run_filled

        results, totals = lax.switch(arrays[0], list(map(filled, branches)), *arrays[1:])
        for leaf in found:
            self._merge(leaf, totals[leaf])
        return list(results)


def _constants(program: Any) -> Sequence[Any]:
    return getattr(program, "consts", ())


def _bind(jaxpr: core.Jaxpr, equation: core.JaxprEqn, arrays: list[Any]) -> list[Any]:
    """The results of a single equation."""
    from jax.extend import core as extended  # Slow to import: it loads Pallas.

    given = {v: x for v, x in zip(equation.invars, arrays, strict=True) if is_variable(v)}
    # A program with this one equation: how a primitive is called differs between versions of JAX.
    alone = jaxpr.replace(
        constvars=[],
        invars=list(given),
        outvars=equation.outvars,
        eqns=[equation],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    results: list[Any] = extended.jaxpr_as_fun(extended.ClosedJaxpr(alone, []))(*given.values())
    return results
