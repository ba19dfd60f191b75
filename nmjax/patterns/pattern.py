"""The interface of a pattern, patterns as text, and a pattern applied to one weight (`LeafPlan`).

A pattern is plain data: frozen, hashable, and not callable. So it can be a static argument of
`jax.jit`, and it passes through `optax.inject_hyperparams`, which turns numbers into arrays and
calls every callable.

A new pattern is one file with two classes: a frozen dataclass that derives from `Pattern`, and its
packed form, which derives from `nmjax.packed.weight.Packed`. Nothing else needs to know about it.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import NamedSharding

from nmjax.layouts.axes import Axes, Shape, size_along
from nmjax.masks.scores import Score
from nmjax.ste import apply_mask

Span = tuple[int, ...]


class Whole(NamedTuple):
    """Weights that a shard must hold together, or their mask needs communication.

    Attributes:
      axes: negative axes that they run along, flattened together.
      length: consecutive weights that belong together.
      what: their name in an error message.
    """

    axes: Span
    length: int
    what: str


class Pattern(abc.ABC):
    """A sparsity structure of a weight.

    Subclasses are frozen dataclasses. `str(pattern)` is text that `parse` reads back.

    Attributes:
      syntax: how to write the pattern as text, for error messages.
    """

    syntax: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Pattern]]] = {}

    def __init_subclass__(cls, **settings: Any) -> None:
        """Makes the subclass known to `parse_pattern`."""
        super().__init_subclass__(**settings)
        # By name, so that a class defined again, as in a notebook, replaces itself.
        Pattern._kinds[f"{cls.__module__}.{cls.__qualname__}"] = cls

    @classmethod
    @abc.abstractmethod
    def parse(cls, text: str) -> Self | None:
        """Reads the pattern from text; None if the text describes another kind of pattern.

        Raises:
          ValueError: the text describes this kind, with impossible numbers.
        """

    @property
    @abc.abstractmethod
    def density(self) -> float:
        """Fraction of the weights that is kept, up to rounding to whole groups or blocks."""

    @abc.abstractmethod
    def kept(self, inputs: int, outputs: int) -> int:
        """Number of weights kept in a matrix (inputs, outputs)."""

    @abc.abstractmethod
    def misfit(self, inputs: int, outputs: int) -> str | None:
        """Why a matrix (inputs, outputs) does not divide into groups or blocks, or None."""

    @abc.abstractmethod
    def mask(self, w: jax.Array, axes: Axes, score: Score) -> jax.Array:
        """Booleans of `w`'s shape, True = kept.

        Args:
          w: weights, real floating dtype.
          axes: negative axes of `w`, as `place` returned them.
          score: importance of each weight.
        """

    def prune(self, w: jax.Array, axes: Axes, score: Score) -> jax.Array:
        """`w` where its mask is True, else zero. Arguments as those of `mask`."""
        return apply_mask(w, self.mask(w, axes, score))

    def prune_to(self, dtype: np.dtype, w: jax.Array, axes: Axes, score: Score) -> jax.Array:
        """`prune(w, axes, score)`, rounded to `dtype`."""
        return self.prune(w, axes, score).astype(dtype)

    @abc.abstractmethod
    def wholes(self, shape: Shape, axes: Axes) -> list[Whole]:
        """What the shards of a weight must not cut.

        Args:
          shape: of the weight.
          axes: negative axes, as `place` returned them.
        """

    @property
    def needs_taps(self) -> bool:
        """Whether the pattern must know which axes are the taps of a convolution."""
        return False

    def place(self, axes: Axes) -> Axes:
        """The axes as the pattern uses them: what groups run along, and what a block holds.

        Args:
          axes: of a layer. `axes.taps` may be None (unknown) unless `needs_taps`.
        """
        return axes._replace(taps=axes.taps or ())

    def runs_along(self, axes: Axes) -> tuple[Span, ...]:
        """The axes along which one group or block extends, for tables."""
        return (axes.reduction,)

    def unit(self, axes: Axes) -> Whole:
        """A group or a block: weights that a product must find side by side, and in line.

        Args:
          axes: as `place` returned them.
        """
        return Whole(axes.reduction, 1, "weights")

    @property
    def is_semi_structured(self) -> bool:
        """Whether every aligned group of 4 inputs keeps at most 2, as sparse tensor cores need."""
        return False


@dataclass(frozen=True)
class LeafPlan:
    """How one weight is made sparse.

    Attributes:
      pattern: its sparsity structure.
      reduction_axes: negative axes that its matmul sums over. Groups run along them, flattened
        together in this order.
      output_axes: negative axes that its matmul keeps. Blocks run along them, flattened together
        in this order.
      shape: shape of the weight. A leaf may have more axes in front of these.
      tap_axes: negative axes of a convolution's taps, if name and shape show them; a block spans
        them all. Axes in none of the three fields hold a stack of weights.
      source: where the axes come from: "program", "given" or "known layer". Plans that differ only
        in this are equal.
      sharding: how the weight lies on a mesh with automatic axes, if `shard_plan` was told.
    """

    pattern: Pattern
    reduction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    shape: Shape = ()
    tap_axes: tuple[int, ...] = ()
    source: str = field(default="", compare=False)
    sharding: NamedSharding | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """Number of weights that are kept."""
        matrices = self.weights // max(self.inputs * self.outputs, 1)
        return self.pattern.kept(self.inputs, self.outputs) * matrices

    @property
    def inputs(self) -> int:
        """Number of weights along the reduction axes."""
        return size_along(self.shape, self.reduction_axes)

    @property
    def outputs(self) -> int:
        """Number of weights along the output axes."""
        return size_along(self.shape, self.output_axes)

    @property
    def misfit(self) -> str | None:
        """Why the weight does not divide into whole groups or blocks, or None."""
        return self.pattern.misfit(self.inputs, self.outputs)

    @property
    def axes(self) -> Axes:
        """All axes except those of a stack."""
        return Axes(self.reduction_axes, self.output_axes, self.tap_axes)

    @property
    def span(self) -> str:
        """The axes along which a group or a block, "inputs x outputs", extends."""
        return " x ".join(", ".join(map(str, span)) for span in self.pattern.runs_along(self.axes))


def parse_pattern(text: str | Pattern) -> Pattern:
    """Reads a pattern from text; returns a pattern unchanged.

    Args:
      text: `"N:M"`, N kept of every M; `"N:M/kernel"` for `NM(N, M, flatten="kernel")`;
        `"N:M/S"` for `NM(N, M, stride=S)`; `"1xN@S"` for `Block1xN(N, S)`; `"1xN@S/layer"` for
        `Block1xN(N, S, uniform=False)`.

    Raises:
      TypeError: `text` is neither text nor a pattern.
      ValueError: the text does not parse, or its numbers are impossible.

    >>> import nmjax
    >>> parse_pattern("2:4")
    NM(n=2, m=4, flatten='channel', stride=1)
    >>> parse_pattern("1x16@0.5")
    Block1xN(n=16, sparsity=0.5, uniform=True)
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise TypeError(
            f'a pattern is text such as "2:4" or "1x16@0.5", an nmjax.NM or an nmjax.Block1xN; '
            f"got {type(text).__name__}"
        )
    # The texts of different kinds do not overlap, so the order does not matter.
    parsed = (kind.parse(text) for kind in Pattern._kinds.values())
    pattern = next((found for found in parsed if found is not None), None)
    if pattern is None:
        syntax = ", or ".join(kind.syntax for kind in Pattern._kinds.values())
        raise ValueError(f"cannot read {text!r} as a pattern; write {syntax}")
    return pattern
