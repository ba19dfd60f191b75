"""What a program does with each weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nmjax.layouts.axes import Axes, Unknown
from nmjax.tracing.views import Pieces, Shape, View

Span = tuple[int, ...]


@dataclass(frozen=True)
class Contraction:
    """A product of a weight with an activation.

    All axes are negative axes of the weight. Axes in none of the fields hold a stack of weights, of
    which the product takes one, or one for each entry of a batch.

    Attributes:
      reduction: axes that the product sums over.
      output: axes that it keeps.
      taps: spatial axes of a convolution.
      groups: feature groups of a convolution; 1 for everything else.
      split: axes of which the product sums over a part only.
      operand: what the product multiplies by.
    """

    reduction: Span
    output: Span
    taps: Span = ()
    groups: int = 1
    split: Span = ()
    operand: View | None = None

    @property
    def axes(self) -> Axes:
        """The roles of the weight's axes."""
        return Axes(self.reduction, self.output, self.taps)

    def stretches(self, span: Span, shape: Shape) -> list[tuple[int, str]]:
        """How many consecutive weights stay together in the operand, and in line with each other.

        Args:
          span: axes of the weight along which the weights are consecutive, flattened together in
            this order.
          shape: of the weight.

        Returns:
          Numbers of weights, with what limits each. Groups stay whole if their size divides all of
          the numbers; 0 stands for no limit.
        """
        if self.operand is None:
            return []
        view, step, steps = self.operand, 1, {}
        for axis in reversed([axis % len(shape) for axis in span]):
            steps[axis] = step
            step *= shape[axis]
        found = []
        for axis, size in steps.items():
            order = view.order(axis)
            found.append((order.aligned * size, f"{order.why} along axis {axis - len(shape)}"))
        along = [pieces for pieces in view.axes if any(p.axis in steps for p in pieces)]

        def distance(pieces: Pieces) -> int:
            return min(steps[p.axis] * p.stride for p in pieces if p.axis in steps)

        # A product may sum over the axes of its operand in any order.
        along.sort(key=distance, reverse=True)
        run = 1
        for piece in reversed([piece for pieces in along for piece in pieces if piece.size > 1]):
            if piece.axis not in steps or steps[piece.axis] * piece.stride != run:
                return [*found, (run, "a reshape, a transpose, or a repetition")]
            run *= piece.size
        return found if run == step else [*found, (run, "a shard")]


@dataclass
class Uses:
    """All uses of one weight.

    Attributes:
      shape: of the weight.
      contractions: its products with activations, without repetitions.
      lookups: axes along which the program picks entries by numbers that depend on the input.
      is_table: whether the program picks entries by many constant numbers.
      derived_from: the weights, this one among them, of values that take part in products with
        activations and that need not be zero where this weight is.
      lost_in: operations through which the weight cannot be followed to such a product.
      is_multiplied_apart: whether it takes part in products without an input: with constants, or
        with other weights.
      is_elementwise: whether it meets activations entry by entry, as a bias does.
      multiply_adds: of all its products.
    """

    shape: Shape
    contractions: list[Contraction] = field(default_factory=list)
    lookups: set[int] = field(default_factory=set)
    is_table: bool = False
    derived_from: set[str] = field(default_factory=set)
    lost_in: set[str] = field(default_factory=set)
    is_multiplied_apart: bool = False
    is_elementwise: bool = False
    multiply_adds: int = 0

    @property
    def is_used(self) -> bool:
        """Whether it meets an activation anywhere."""
        return bool(self.contractions or self.lookups or self.is_table or self.is_elementwise)

    @property
    def output(self) -> frozenset[int]:
        """All axes along which products write channels; a depthwise one only passes them on."""
        written = [c for c in self.contractions if c.reduction and not self._is_depthwise(c)]
        return frozenset(axis for c in written for axis in c.output)

    def axes(self) -> Axes | str | Unknown:
        """The axes of the weight's products; the reason to leave it dense; or what is unclear."""
        if self.lost_in:
            operations = ", ".join(sorted(self.lost_in))
            return Unknown(f"the program passes it through {operations} before a product")
        if self.derived_from:
            others = ", ".join(sorted(self.derived_from))
            return Unknown(f"its product multiplies by a value derived from {others}")
        # A vector such as a bias or a gain may take part in products, but has no matrix.
        matrices = [c for c in self.contractions if c.reduction and c.output]
        if not matrices and self.is_multiplied_apart:
            return Unknown("its products have no input in them: with constants or other weights")
        if not matrices:
            return self._reason()
        # Picking matrices from a stack, such as experts, leaves the axes of the matrices whole.
        if any(self.lookups.intersection(c.reduction + c.output) for c in matrices):
            return "look-up table that is also multiplied (tied embedding)"
        if all(map(self._is_depthwise, matrices)):
            return "one input per output (depthwise)"
        return _agreed(matrices)

    def _is_depthwise(self, c: Contraction) -> bool:
        return c.groups > 1 and all(self.shape[axis] == 1 for axis in c.reduction)

    def _reason(self) -> str:
        if any(c.reduction for c in self.contractions):
            return "a vector: its products have no output axis"
        if self.lookups or self.is_table:
            return "embedding (a look-up table)"
        if self.is_elementwise or self.contractions:
            return "in no product: meets activations entry by entry"
        return "in no product with an activation"


def _agreed(contractions: Sequence[Contraction]) -> Axes | Unknown:
    split = sorted({axis for c in contractions for axis in c.split})
    if split:
        return Unknown(f"a product sums over a part of axis {split[0]} only")
    reductions = {c.reduction: None for c in contractions}
    if len(reductions) > 1:
        sums = " and ".join(str(_short(span)) for span in reductions)
        return Unknown(f"different products sum over different axes: {sums}")
    first = contractions[0]
    # Products of different layers of a stack, or of parts of it, agree on the sum at least.
    agree = all((c.output, c.taps) == (first.output, first.taps) for c in contractions)
    return Axes(first.reduction, first.output, first.taps if agree else None)


def contraction(
    view: View,
    reduction: Sequence[int],
    output: Sequence[int],
    taps: Sequence[int] = (),
    groups: int = 1,
) -> Contraction:
    """The contraction of a weight, from the axes of a view of it that a product uses.

    Args:
      view: of the operand of the product.
      reduction: the operand's axes that the product sums over.
      output: those that it keeps.
      taps: those that a convolution slides along.
      groups: feature groups of a convolution.
    """
    named = {
        **dict.fromkeys(reduction, "reduction"),
        **dict.fromkeys(output, "output"),
        **dict.fromkeys(taps, "taps"),
    }
    roles: dict[int, set[str]] = {}
    covered: dict[int, int] = {}
    for axis, pieces in enumerate(view.axes):
        stack, groups = stack_of_groups(view, pieces, groups) if axis in output else (0, groups)
        for i, piece in enumerate(pieces):
            if piece.axis is not None:
                role = "stack" if i < stack else named.get(axis, "stack")
                roles.setdefault(piece.axis, set()).add(role)
                covered[piece.axis] = covered.get(piece.axis, 1) * piece.size

    def axes_of(role: str) -> Span:
        return tuple(axis - len(view.shape) for axis in sorted(roles) if role in roles[axis])

    # A convolution sums over its taps as well as over its inputs.
    split = [
        axis - len(view.shape)
        for axis, found in roles.items()
        if "reduction" in found
        and (not found <= {"reduction", "taps"} or covered[axis] < view.shape[axis])
    ]
    summed = axes_of("reduction")
    return Contraction(
        summed,
        axes_of("output"),
        tuple(axis for axis in axes_of("taps") if axis not in summed),
        groups,
        tuple(split),
        view,
    )


def stack_of_groups(view: View, pieces: Pieces, groups: int) -> tuple[int, int]:
    """How many of an output axis' pieces stack layers, and the feature groups in each layer."""
    # vmap makes one grouped convolution of a stack: a group, or some, for each layer.
    for i, piece in enumerate(pieces[:-1]):
        whole = piece.axis is not None and piece.size == view.shape[piece.axis]
        if not whole or groups % piece.size:
            return i, groups
        groups //= piece.size
    return len(pieces[:-1]), groups


def _short(span: Span) -> int | Span:
    return span[0] if len(span) == 1 else span
