"""N:M: at most N of every M weights along the reduction axis, consecutive or a stride apart."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import jax
import numpy as np

from nmjax.layouts.axes import Axes, Shape
from nmjax.masks.arguments import check_n_of_m, check_stride, group_name
from nmjax.masks.nm import nm_mask, nm_prune
from nmjax.masks.scores import Score
from nmjax.patterns.pattern import Pattern, Whole

Flatten = Literal["channel", "kernel"]

# Binomial coefficients of larger groups are too long to compute: C(2e6, 1e6) has 600,000 digits.
_EXACT = 1024
# ASCII digits only, and no line breaks.
_TEXT = re.compile(r" *([0-9]{1,9}) *: *([0-9]{1,9}) *(?:/ *(kernel|channel|[0-9]{1,9}))? *")


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
      stride: distance between the members of a group. With a stride s, each run of m * s
        consecutive weights holds s groups, and group r of a run has its members at r, r + s, ...,
        r + (m - 1) * s. TPUs rebuild such weights from whole register tiles if s is a multiple of
        a tile's rows, and need no interleaving. Sparse tensor cores of GPUs need stride 1. Only
        with `flatten="channel"`. As text: `"2:4/16"`.

    Raises:
      TypeError: `n`, `m` or `stride` is not an integer.
      ValueError: not 1 <= n <= m; `stride` < 1; `flatten` is unknown; a stride other than 1 with
        `flatten="kernel"`.

    >>> NM(2, 4).density
    0.5
    >>> str(NM(2, 8, flatten="kernel")), str(NM(2, 4, stride=16))
    ('2:8/kernel', '2:4/16')
    """

    syntax: ClassVar[str] = (
        '"N:M" with N kept of every M weights, such as "2:4" or "1:16", or "N:M/kernel" to group '
        'over a whole convolution filter, or "N:M/S" for groups of weights that lie S apart'
    )

    n: int
    m: int
    flatten: Flatten = "channel"
    stride: int = 1

    def __post_init__(self) -> None:
        check_n_of_m(self.n, self.m)
        check_stride(self.stride)
        # NumPy integers become Python's, so that equal patterns hash and print alike.
        for name in ("n", "m", "stride"):
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        if self.flatten not in ("channel", "kernel"):
            raise ValueError(f'flatten must be "channel" or "kernel", got {self.flatten!r}')
        if self.flatten == "kernel" and self.stride > 1:
            raise ValueError(
                f'flatten="kernel" takes stride 1, got {self.stride}: strided groups run along the '
                f'input channels of one tap; write "{self.n}:{self.m}/{self.stride}" for them'
            )

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Reads "2:4", "2:4/kernel" or "2:4/16"."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        n, m, suffix = match.groups()
        if suffix is None or suffix in ("channel", "kernel"):
            return cls(int(n), int(m), flatten="kernel" if suffix == "kernel" else "channel")
        return cls(int(n), int(m), stride=int(suffix))

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept, n / m."""
        return self.n / self.m

    @property
    def run(self) -> int:
        """The fewest consecutive weights that hold whole groups, m * stride."""
        return self.m * self.stride

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
        if inputs % self.run == 0:
            return None
        factors = f" = {self.m} * {self.stride}" if self.stride > 1 else ""
        return f"{inputs} inputs are not a multiple of {self.run}{factors}"

    def mask(self, w: jax.Array, axes: Axes, score: Score) -> jax.Array:
        """Keeps the n highest scores of each group, as `nmjax.nm_mask` does."""
        return nm_mask(w, self.n, self.m, axes.reduction, score=score, stride=self.stride)

    def prune(self, w: jax.Array, axes: Axes, score: Score) -> jax.Array:
        """Computes and applies the mask in one pass over `w`."""
        return nm_prune(w, self.n, self.m, axes.reduction, score=score, stride=self.stride)

    def prune_to(self, dtype: np.dtype, w: jax.Array, axes: Axes, score: Score) -> jax.Array:
        """Computes and applies the mask and rounds, all in one pass over `w`."""
        axis = axes.reduction
        return nm_prune(w, self.n, self.m, axis, score=score, stride=self.stride, dtype=dtype)

    def wholes(self, shape: Shape, axes: Axes) -> list[Whole]:
        """A shard must hold whole groups, and so whole runs of them if they are strided."""
        del shape
        return [self.unit(axes)]

    def unit(self, axes: Axes) -> Whole:
        """A group, or a run of strided groups."""
        return Whole(axes.reduction, self.run, group_name(self.m, self.stride))

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
        if self.stride > 1:
            # Four neighbors belong to as many groups as the stride, up to four. Each of these may
            # keep n of them.
            return (self.n, self.stride) == (1, 2) and self.m % 2 == 0
        # Groups of 4 lie within groups of m; all kept weights may fall into one of them.
        if self.m % 4 == 0:
            return self.n <= 2
        return self.m == 2 and self.n == 1

    def check_consecutive(self, what: str) -> None:
        """Raises ValueError if groups are strided, for what takes consecutive weights only.

        Args:
          what: the subject of the message, such as a method or a file format.
        """
        if self.stride > 1:
            raise ValueError(
                f"{what} takes groups of consecutive weights, and those of {self} lie "
                f'{self.stride} apart; plan "{self.n}:{self.m}" instead'
            )

    def __str__(self) -> str:
        if self.stride > 1:
            return f"{self.n}:{self.m}/{self.stride}"
        return f"{self.n}:{self.m}{'/kernel' if self.flatten == 'kernel' else ''}"
