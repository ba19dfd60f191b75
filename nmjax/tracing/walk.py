"""Walks a jaxpr once, through calls, loops, and branches, and lets a reader interpret it.

A reader assigns a value of its own to every variable: what it knows about the variable, not its
numbers. The walk owns the control flow; the reader owns the meaning of all other operations.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from jax.extend import core

Value = TypeVar("Value")
Shape = tuple[int, ...]
# How often an equation runs in one forward pass; None while a loop looks for its fixed point, when
# nothing may be recorded.
Times = int | None


class Reader(abc.ABC, Generic[Value]):
    """Interprets the operations of a program."""

    @abc.abstractmethod
    def constant(self, operand: Any) -> Value:
        """The value of a literal, or of an array that the program closes over."""

    @abc.abstractmethod
    def apply(
        self, equation: core.JaxprEqn, operands: Sequence[Value], times: Times
    ) -> list[Value]:
        """The values of an equation's results."""

    @abc.abstractmethod
    def join(self, a: Value, b: Value) -> Value:
        """The value of a variable that is `a` or `b`; joining on and on must end somewhere."""

    @abc.abstractmethod
    def chosen(self, value: Value, by: Value, shape: Shape) -> Value:
        """The value of a branch, if another value decided which branch runs."""

    @abc.abstractmethod
    def entry(self, value: Value, shape: Shape) -> Value:
        """One entry of a value along its leading axis, as a scan passes it to its body."""

    @abc.abstractmethod
    def stacked(self, value: Value, shape: Shape, length: int) -> Value:
        """`length` such values along a new leading axis, as a scan returns them."""

    @abc.abstractmethod
    def resized(self, value: Value, before: Shape, after: Shape) -> Value:
        """The value with axes of other sizes: the shard of an array, or the array of a shard."""

    def walk(self, jaxpr: core.Jaxpr, arguments: Sequence[Value], times: Times = 1) -> list[Value]:
        """Interprets a program and returns the values of its results."""
        known = dict(zip(jaxpr.invars, arguments, strict=True))

        def value_of(operand: Any) -> Value:
            if is_variable(operand) and operand in known:
                return known[operand]
            return self.constant(operand)

        for equation in jaxpr.eqns:
            operands = [value_of(operand) for operand in equation.invars]
            results = self.interpret(equation, operands, times)
            known.update(zip(equation.outvars, results, strict=True))
        return [value_of(operand) for operand in jaxpr.outvars]

    def interpret(
        self, equation: core.JaxprEqn, operands: list[Value], times: Times
    ) -> list[Value]:
        """The values of an equation's results, loops and branches included."""
        name, parameters = equation.primitive.name, equation.params
        if name == "scan":
            return self._scan(equation, operands, times)
        if name == "while":
            return self._while(parameters, operands, times)
        if name == "cond":
            return self._cond(equation, operands, times)
        if name == "shard_map":
            body = opened(parameters["jaxpr"])
            outside, inside = map(shape_of, equation.invars), map(shape_of, body.invars)
            results = self.walk(body, list(map(self.resized, operands, outside, inside)), times)
            inside, outside = map(shape_of, body.outvars), map(shape_of, equation.outvars)
            return list(map(self.resized, results, inside, outside))
        called = called_program(equation)
        if called is not None:
            return self.walk(opened(called), operands, times)
        return self.apply(equation, operands, times)

    def _scan(self, equation: core.JaxprEqn, operands: list[Value], times: Times) -> list[Value]:
        body, length = opened(equation.params["jaxpr"]), equation.params["length"]
        constants, carried = parts_of_scan(equation.params)
        first, carry = operands[:constants], operands[constants : constants + carried]
        shapes = map(shape_of, equation.invars[constants + carried :])
        entries = list(map(self.entry, operands[constants + carried :], shapes))
        carry = self.settle(
            carry, lambda carry: self.walk(body, [*first, *carry, *entries], None)[:carried]
        )
        results = self.walk(body, [*first, *carry, *entries], times and times * length)
        shapes = map(shape_of, body.outvars[carried:])
        stacks = [
            self.stacked(value, shape, length)
            for value, shape in zip(results[carried:], shapes, strict=True)
        ]
        return results[:carried] + stacks

    def _while(
        self, parameters: Mapping[str, Any], operands: list[Value], times: Times
    ) -> list[Value]:
        condition, body = opened(parameters["cond_jaxpr"]), opened(parameters["body_jaxpr"])
        for_condition = parameters["cond_nconsts"]
        carried = for_condition + parameters["body_nconsts"]
        constants, carry = operands[for_condition:carried], operands[carried:]
        carry = self.settle(carry, lambda carry: self.walk(body, [*constants, *carry], None))
        self.walk(condition, [*operands[:for_condition], *carry], times)
        self.walk(body, [*constants, *carry], times)
        return carry

    def settle(self, carry: list[Value], step: Any) -> list[Value]:
        """Joins what a loop carries with what its body makes of it, until nothing changes."""
        # A state that starts as zeros depends on the input after the first pass, so the products
        # of that pass do not yet show what they multiply.
        while True:
            joined = [self.join(a, b) for a, b in zip(carry, step(carry), strict=True)]
            if joined == carry:
                return carry
            carry = joined

    def _cond(self, equation: core.JaxprEqn, operands: list[Value], times: Times) -> list[Value]:
        decider, *arguments = operands
        # Only the first branch counts as run, so that a total is the cost of one path.
        branches = [
            self.walk(opened(branch), arguments, times if i == 0 else times and 0)
            for i, branch in enumerate(equation.params["branches"])
        ]
        results = branches[0]
        for branch in branches[1:]:
            results = list(map(self.join, results, branch))
        shapes = map(shape_of, equation.outvars)
        return [
            self.chosen(value, decider, shape) for value, shape in zip(results, shapes, strict=True)
        ]


def is_variable(operand: Any) -> bool:
    """Whether an operand is a variable; the others are literals, which carry their value.

    It tests for `jax.extend.core.Var` without importing `jax.extend`: that also loads Pallas, which
    takes 15 ms, a fifth of `import nmjax`.
    """
    return not hasattr(operand, "val")


def shape_of(operand: Any) -> Shape:
    """The shape of an operand of an equation."""
    return tuple(getattr(operand.aval, "shape", ()))


def opened(jaxpr: Any) -> core.Jaxpr:
    """The program itself, without the constants of a closed one."""
    opened: core.Jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return opened


def called_program(equation: core.JaxprEqn) -> Any:
    """The program that a call runs on its operands: of jit, remat, custom derivatives, and so on.

    It may be closed, with constants of its own. None if the equation is not a call. The programs
    inside a reduction or a kernel take other arguments than the equation does.
    """
    operands = list(map(shape_of, equation.invars))
    results = list(map(shape_of, equation.outvars))
    for parameter in equation.params.values():
        body = opened(parameter)
        if not hasattr(body, "eqns") or equation.primitive.name in _NOT_CALLS:
            continue
        if [*map(shape_of, body.invars)] == operands and [*map(shape_of, body.outvars)] == results:
            return parameter
    return None


_NOT_CALLS = frozenset(("reduce", "reduce_window", "scatter", "sort", "pallas_call"))


def parts_of_scan(parameters: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants and how many carried values a scan has."""
    if "ft_in" in parameters:  # jax 0.12 and later: a tree of (constants, carry, inputs).
        constants, carry, _ = (len(list(part)) for part in parameters["ft_in"].unpack())
        return constants, carry
    return parameters["num_consts"], parameters["num_carry"]
