"""N:M: at most N of every M consecutive weights along the reduction axis."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import jax

from nmjax.layouts.axes import Axes, Shape
from nmjax.masks.arguments import check_n_of_m
from nmjax.masks.nm import nm_mask
from nmjax.masks.scores import Score
from nmjax.patterns.pattern import Pattern, Whole

Flatten = Literal["channel", "kernel"]

# Binomial coefficients of larger groups are too long to compute: C(2e6, 1e6) has 600,000 digits.
_EXACT = 1024
# ASCII digits only, and no line breaks.
_TEXT = re.compile(r" *([0-9]{1,9}) *: *([0-9]{1,9}) *(?:/ *(kernel|channel))? *")


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` of every `m` consecutive weights along the reduction axis are nonzero.

    `n` counts the weights that are *kept*, as in NVIDIA's 2:4 and in the SR-STE paper. Some tools
    (Wanda, SparseGPT, TensorFlow Model Optimization) count the pruned ones instead.

    Args:
      n: weights kept in a group, 1 <= n <= m.
      m: weights in a group.
      flatten: what "consecutive" means for a convolution kernel. `"channel"`: input channels at
        one tap, which is what sparse hardware reads. `"kernel"`: all inputs of a filter in the
        order (input channel, row, column), the grouping behind the tables of the original paper
        (Zhou et al., ICLR 2021, Figure 5). The two differ only for kernels wider than 1x1.

    Raises:
      TypeError: `n` or `m` is not an integer.
      ValueError: not 1 <= n <= m, or `flatten` is unknown.

    >>> NM(2, 4).density
    0.5
    >>> str(NM(2, 8, flatten="kernel"))
    '2:8/kernel'
    """

    syntax: ClassVar[str] = (
        '"N:M" with N kept of every M weights, such as "2:4" or "1:16", or "N:M/kernel" to group '
        "over a whole convolution filter"
    )

    n: int
    m: int
    flatten: Flatten = "channel"

    def __post_init__(self) -> None:
        check_n_of_m(self.n, self.m)
        # NumPy integers become Python's, so that equal patterns hash and print alike.
        object.__setattr__(self, "n", operator.index(self.n))
        object.__setattr__(self, "m", operator.index(self.m))
        if self.flatten not in ("channel", "kernel"):
            raise ValueError(f'flatten must be "channel" or "kernel", got {self.flatten!r}')

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Reads "2:4" or "2:4/kernel"."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        n, m, flatten = match.groups()
        return cls(int(n), int(m), flatten="kernel" if flatten == "kernel" else "channel")

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept, n / m."""
        return self.n / self.m

    @property
    def index_bits(self) -> float:
        """Bits per weight that any encoding of the positions needs: log2(C(m, n)) / m."""
        if self.m <= _EXACT:
            return math.log2(math.comb(self.m, self.n)) / self.m
        n, m = self.n, self.m
        natural = math.lgamma(m + 1) - math.lgamma(n + 1) - math.lgamma(m - n + 1)
        return natural / math.log(2) / m

    def kept(self, inputs: int, outputs: int) -> int:
        """Number of weights kept in a matrix (inputs, outputs)."""
        return inputs * outputs * self.n // self.m

    def misfit(self, inputs: int, outputs: int) -> str | None:
        """Why a matrix (inputs, outputs) does not divide into groups, or None."""
        del outputs  # Groups run along inputs only.
        return f"{inputs} inputs are not a multiple of {self.m}" if inputs % self.m else None

    def mask(self, w: jax.Array, axes: Axes, score: Score) -> jax.Array:
        """Keeps the n highest scores of each group, as `nmjax.nm_mask` does."""
        along = axes.reduction[0] if len(axes.reduction) == 1 else axes.reduction
        return nm_mask(w, self.n, self.m, along, score=score)

    def wholes(self, shape: Shape, axes: Axes) -> list[Whole]:
        """A shard must hold whole groups."""
        del shape
        return [self.unit(axes)]

    def unit(self, axes: Axes) -> Whole:
        """A group."""
        return Whole(axes.reduction, self.m, f"groups of {self.m}")

    @property
    def needs_taps(self) -> bool:
        """Whether groups run over the taps too."""
        return self.flatten == "kernel"

    def place(self, axes: Axes) -> Axes:
        """Groups run along the inputs at each tap, or along inputs and taps together."""
        if self.flatten == "channel":
            return super().place(axes)
        return Axes(axes.reduction + (axes.taps or ()), axes.output)

    @property
    def is_semi_structured(self) -> bool:
        """Whether every aligned group of 4 inputs keeps at most 2."""
        # Groups of 4 lie within groups of m; all kept weights may fall into one of them.
        if self.m % 4 == 0:
            return self.n <= 2
        return self.m == 2 and self.n == 1

    def __str__(self) -> str:
        suffix = "/kernel" if self.flatten == "kernel" else ""
        return f"{self.n}:{self.m}{suffix}"
