"""The structures a weight can be held to: how many of how many weights or blocks stay.

A pattern is plain data: frozen, hashable and not callable. It can therefore be a static argument
of `jax.jit`, and `optax.inject_hyperparams`, which turns numbers into arrays and calls every
callable, passes it through untouched.
"""

from __future__ import annotations

import math
import numbers
import operator
import re
from dataclasses import dataclass
from typing import Literal

Flatten = Literal["channel", "kernel"]

# What becomes of the taps of a convolution kernel: each takes the pattern by itself, they join
# the inputs that groups run over, or a block holds them all.
Taps = Literal["apart", "with inputs", "in block"]

_NM_TEXT = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*(?:/\s*(kernel|channel))?\s*")
_BLOCK_TEXT = re.compile(
    r"\s*1\s*[xX]\s*(\d+)\s*@\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(?:/\s*(row|layer))?\s*"
)


@dataclass(frozen=True, slots=True)
class NM:
    """At most `n` of every `m` consecutive weights along the reduction axis are non-zero.

    `n` counts the weights that are *kept*, as in NVIDIA's 2:4 and in the papers on SR-STE. Some
    tools (Wanda, SparseGPT, TensorFlow Model Optimization) count the pruned ones instead.

    Args:
      n: weights kept in a group, 1 <= n <= m.
      m: weights in a group.
      flatten: what "consecutive" means for a convolution kernel. `"channel"`: input channels at
        one tap, which is what sparse hardware reads. `"kernel"`: all inputs of a filter in the
        order (input channel, row, column), the grouping behind the tables of the original paper
        (Zhou et al., ICLR 2021, Figure 5). The two agree for everything but convolutions wider
        than 1x1.

    Raises:
      TypeError: `n` or `m` is not an integer.
      ValueError: not 1 <= n <= m, or `flatten` is unknown.

    >>> NM(2, 4).density
    0.5
    >>> str(NM(2, 8, flatten="kernel"))
    '2:8/kernel'
    """

    n: int
    m: int
    flatten: Flatten = "channel"

    def __post_init__(self) -> None:
        check_n_of_m(self.n, self.m)
        object.__setattr__(self, "n", operator.index(self.n))
        object.__setattr__(self, "m", operator.index(self.m))
        if self.flatten not in ("channel", "kernel"):
            raise ValueError(f'flatten must be "channel" or "kernel", got {self.flatten!r}')

    @property
    def density(self) -> float:
        """Fraction of the weights that stays, n / m."""
        return self.n / self.m

    @property
    def index_bits(self) -> float:
        """Bits per weight that any encoding of the positions needs: log2(C(m, n)) / m."""
        return math.log2(math.comb(self.m, self.n)) / self.m

    @property
    def taps(self) -> Taps:
        """What becomes of the taps of a convolution kernel."""
        return "with inputs" if self.flatten == "kernel" else "apart"

    def kept(self, inputs: int, outputs: int) -> int:
        """How many weights of a matrix with so many inputs and outputs stay."""
        return inputs * outputs * self.n // self.m

    def misfit(self, inputs: int, outputs: int) -> str | None:
        """Why a matrix with so many inputs and outputs cannot take the pattern, or None."""
        del outputs
        return f"{inputs} inputs are not a multiple of {self.m}" if inputs % self.m else None

    def __str__(self) -> str:
        suffix = "/kernel" if self.flatten == "kernel" else ""
        return f"{self.n}:{self.m}{suffix}"


@dataclass(frozen=True, slots=True)
class Block1xN:
    """Blocks of `n` consecutive output channels at one input channel are kept or dropped together.

    In a convolution a block holds all taps of the kernel. The blocks of the same `n` outputs, one
    for each input, are a *row of blocks*. Outputs of a grouped convolution read different inputs
    from group to group, so there `n` should divide the outputs of a group; shapes do not tell.

    Args:
      n: output channels in a block, at least 1; must divide the output channels.
      sparsity: fraction of the blocks that is dropped, 0 <= sparsity < 1. Of c blocks
        `floor(sparsity * c)` are, the product being one of Python floats.
      uniform: True if every row of blocks drops the same number, so that threads that each take a
        row have equal work (SUBP); False if the blocks of a layer compete with one another, as in
        the paper on 1xN. As text: `"1x16@0.5"` and `"1x16@0.5/layer"`.

    Raises:
      TypeError: `n` is not an integer, `sparsity` not a number, `uniform` not a bool.
      ValueError: `n` < 1, or not 0 <= sparsity < 1.

    Source: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks", TPAMI 2022; uniform
    rows: Xiang et al., "SUBP: Soft Uniform Block Pruning", NeurIPS 2023.

    >>> Block1xN(16, 0.5).kept_blocks(256)
    128
    >>> str(Block1xN(16, 66 / 128))
    '1x16@0.515625'
    """

    n: int
    sparsity: float
    uniform: bool = True

    def __post_init__(self) -> None:
        check_block(self.n, self.sparsity)
        if not isinstance(self.uniform, bool):
            raise TypeError(f"uniform must be True or False, got {self.uniform!r}")
        object.__setattr__(self, "n", operator.index(self.n))
        object.__setattr__(self, "sparsity", float(self.sparsity))

    @property
    def density(self) -> float:
        """Fraction of the blocks that stays, up to rounding to whole blocks."""
        return 1.0 - self.sparsity

    @property
    def taps(self) -> Taps:
        """What becomes of the taps of a convolution kernel."""
        return "in block"

    def kept_blocks(self, blocks: int) -> int:
        """How many of so many blocks, those of a row or of a layer, stay."""
        return blocks - math.floor(self.sparsity * blocks)

    def kept(self, inputs: int, outputs: int) -> int:
        """How many weights of a matrix with so many inputs and outputs stay."""
        rows = outputs // self.n
        blocks = (
            rows * self.kept_blocks(inputs) if self.uniform else self.kept_blocks(rows * inputs)
        )
        return blocks * self.n

    def misfit(self, inputs: int, outputs: int) -> str | None:
        """Why a matrix with so many inputs and outputs cannot take the pattern, or None."""
        del inputs
        return f"{outputs} outputs are not a multiple of {self.n}" if outputs % self.n else None

    def __str__(self) -> str:
        return f"1x{self.n}@{self.sparsity!r}{'' if self.uniform else '/layer'}"


Pattern = NM | Block1xN


def check_n_of_m(n: int, m: int) -> None:
    """Raises TypeError or ValueError unless `n` and `m` are integers with 1 <= n <= m."""
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not _is_integer(value):
            raise TypeError(
                f"{name} must be a Python integer, got {value!r} of type {type(value).__name__}; "
                'inside optax.inject_hyperparams pass the pattern as text, such as "2:4"'
            )
    if not 1 <= n <= m:
        raise ValueError(
            f"a pattern keeps n of every m weights with 1 <= n <= m, got n={n}, m={m}"
            + (f"; did you mean {m}:{n}?" if 1 <= m < n else "")
        )


def check_block(n: int, sparsity: float) -> None:
    """Raises TypeError or ValueError unless `n` is an integer >= 1 and 0 <= `sparsity` < 1."""
    if isinstance(n, bool) or not _is_integer(n):
        raise TypeError(f"n must be a Python integer, got {n!r} of type {type(n).__name__}")
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(
            f"sparsity must be a Python number, got {sparsity!r} of type "
            f"{type(sparsity).__name__}; inside optax.inject_hyperparams pass the pattern as text, "
            'such as "1x16@0.5"'
        )
    if n < 1:
        raise ValueError(f"a block holds n >= 1 output channels, got n={n}")
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity is the fraction of blocks to drop, 0 <= sparsity < 1, got {sparsity}"
            + (f"; did you mean {sparsity / 100}?" if 1 < sparsity < 100 else "")
        )


def _is_integer(value: object) -> bool:
    """Whether `value` can serve as an index; arrays of several numbers and tracers cannot."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def parse_pattern(text: str | Pattern) -> Pattern:
    """Reads a pattern from text; a pattern comes back as it is.

    Args:
      text: `"N:M"`, N kept of every M; `"N:M/kernel"` for `NM(N, M, flatten="kernel")`;
        `"1xN@S"` for `Block1xN(N, S)`; `"1xN@S/layer"` for `Block1xN(N, S, uniform=False)`.

    Raises:
      TypeError: `text` is neither text nor a pattern.
      ValueError: the text does not parse, or its numbers make no pattern.

    >>> parse_pattern("2:4")
    NM(n=2, m=4, flatten='channel')
    >>> parse_pattern("1x16@0.5")
    Block1xN(n=16, sparsity=0.5, uniform=True)
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise TypeError(
            f'a pattern is text such as "2:4" or "1x16@0.5", an nmjax.NM or an nmjax.Block1xN, '
            f"got {text!r} of type {type(text).__name__}"
        )
    if match := _NM_TEXT.fullmatch(text):
        n, m, flatten = match.groups()
        return NM(int(n), int(m), flatten="kernel" if flatten == "kernel" else "channel")
    if match := _BLOCK_TEXT.fullmatch(text):
        n, sparsity, scope = match.groups()
        return Block1xN(int(n), float(sparsity), uniform=scope != "layer")
    raise ValueError(
        f'cannot read {text!r} as a pattern; write "N:M" with N kept of every M weights, such '
        'as "2:4" or "1:16", or "N:M/kernel" to group over a whole convolution filter, or "1xN@S" '
        'for blocks of N outputs of which the fraction S is dropped, such as "1x16@0.5"'
    )
