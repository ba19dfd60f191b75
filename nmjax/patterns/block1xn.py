"""1xN: blocks of N consecutive output channels at one input channel."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeGuard

import jax

from nmjax.layouts.axes import Axes, Shape, size_along
from nmjax.masks.arguments import as_written, check_block, kept_blocks
from nmjax.masks.blocks import block_mask
from nmjax.masks.scores import Score, block_sum, score_weights
from nmjax.patterns.pattern import Pattern, Span, Whole

# ASCII digits only, and no line breaks.
_TEXT = re.compile(
    r" *1 *[xX] *([0-9]{1,9}) *@ *([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?) *(?:/ *(row|layer))? *"
)


@dataclass(frozen=True)
class Block1xN(Pattern):
    """Blocks of `n` consecutive output channels at one input channel are kept or dropped together.

    In a convolution a block holds all taps of the kernel. The blocks of the same `n` outputs, one
    for each input, are a *row of blocks*. In a grouped convolution `n` should divide the outputs
    of a group, since each group reads different inputs; shapes cannot show whether it does.

    Args:
      n: output channels in a block, at least 1; must divide the output channels.
      sparsity: fraction of the blocks that is dropped, 0 <= sparsity < 1. Out of c blocks,
        `floor(sparsity * c)` are dropped. The number counts as it is written: 0.29 is 29/100, and
        1 / 3 is a third, so no block is lost to floating-point rounding. So does a NumPy float,
        such as `np.float32(0.29)`.
      uniform: True if every row of blocks drops the same number, so that threads that each take a
        row have equal work (SUBP); False if all blocks of a layer compete, as in the 1xN paper.
        As text: `"1x16@0.5"` and `"1x16@0.5/layer"`.

    Raises:
      TypeError: `n` is not an integer, `sparsity` not a number, or `uniform` not a bool.
      ValueError: `n` < 1, or not 0 <= sparsity < 1.

    Source: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks", TPAMI 2022; uniform
    rows: Xiang et al., "SUBP: Soft Uniform Block Pruning", NeurIPS 2023.

    >>> Block1xN(16, 0.5).kept_blocks(256), Block1xN(16, 0.29).kept_blocks(100)
    (128, 71)
    >>> str(Block1xN(16, 66 / 128))
    '1x16@0.515625'
    """

    syntax: ClassVar[str] = (
        '"1xN@S" to drop a fraction S of the blocks of N outputs, such as "1x16@0.5"'
    )

    n: int
    sparsity: float
    uniform: bool = True

    def __post_init__(self) -> None:
        check_block(self.n, self.sparsity)
        if not isinstance(self.uniform, bool):
            raise TypeError(f"uniform must be True or False, got {self.uniform!r}")
        # NumPy numbers become Python's, so that equal patterns hash and print alike.
        object.__setattr__(self, "n", operator.index(self.n))
        object.__setattr__(self, "sparsity", as_written(self.sparsity))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Reads "1x16@0.5" or "1x16@0.5/layer"."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        n, sparsity, scope = match.groups()
        return cls(int(n), float(sparsity), uniform=scope != "layer")

    @property
    def density(self) -> float:
        """Fraction of the blocks that is kept, up to rounding to whole blocks."""
        return 1.0 - self.sparsity

    def kept_blocks(self, blocks: int) -> int:
        """Number of blocks kept out of `blocks`, in a row or in a layer."""
        return kept_blocks(self.sparsity, blocks)

    def kept(self, inputs: int, outputs: int) -> int:
        """Number of weights kept in a matrix (inputs, outputs)."""
        rows = outputs // self.n
        blocks = (
            rows * self.kept_blocks(inputs) if self.uniform else self.kept_blocks(rows * inputs)
        )
        return blocks * self.n

    def misfit(self, inputs: int, outputs: int) -> str | None:
        """Why a matrix (inputs, outputs) does not divide into blocks, or None."""
        del inputs  # Blocks run along outputs; any number of inputs will do.
        return f"{outputs} outputs are not a multiple of {self.n}" if outputs % self.n else None

    def mask(self, w: jax.Array, axes: Axes, score: Score) -> jax.Array:
        """Keeps the blocks with the highest sums of scores, as `nmjax.block_mask` does."""
        # The plan's score ranks weights; a block's score is the sum over its weights.
        return block_mask(
            score_weights(w, score),
            self.n,
            self.sparsity,
            block_sum,
            uniform=self.uniform,
            reduction_axes=axes.reduction,
            output_axes=axes.output,
            tap_axes=axes.taps,
        )

    def wholes(self, shape: Shape, axes: Axes) -> list[Whole]:
        """A shard must hold whole blocks, and all blocks that compete with each other."""

        def all_along(axes: Span, what: str) -> Whole:
            return Whole(axes, size_along(shape, axes), what)

        compete = "the blocks of a row, which compete" if self.uniform else "the competing blocks"
        return [
            self.unit(axes)
            if self.uniform
            else all_along(axes.output, "the layer, whose blocks compete"),
            all_along(axes.taps or (), "blocks, which hold all taps"),
            all_along(axes.reduction, compete),
        ]

    def unit(self, axes: Axes) -> Whole:
        """A block. The blocks of a row may be at any inputs."""
        return Whole(axes.output, self.n, f"blocks of {self.n} outputs")

    @property
    def needs_taps(self) -> bool:
        """A block holds all taps."""
        return True

    def runs_along(self, axes: Axes) -> tuple[Span, ...]:
        """A block extends over outputs; the blocks of a row follow the inputs."""
        return axes.reduction, axes.output

    def __str__(self) -> str:
        return f"1x{self.n}@{self.sparsity!r}{'' if self.uniform else '/layer'}"


def is_blocks(pattern: Any) -> TypeGuard[Block1xN]:
    """Whether a pattern is one of 1xN blocks, which some measures and methods are defined for."""
    return isinstance(pattern, Block1xN)
