"""The structures a weight can be held to: how many of how many weights stay.

A pattern is plain data: frozen, hashable and not callable. It can therefore be a static argument
of `jax.jit`, and `optax.inject_hyperparams`, which turns numbers into arrays and calls every
callable, passes it through untouched.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from typing import Literal

Flatten = Literal["channel", "kernel"]

_TEXT = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*(?:/\s*(kernel|channel))?\s*")


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

    def __str__(self) -> str:
        suffix = "/kernel" if self.flatten == "kernel" else ""
        return f"{self.n}:{self.m}{suffix}"


Pattern = NM


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
      text: `"N:M"`, N kept of every M, or `"N:M/kernel"` for `NM(N, M, flatten="kernel")`.

    Raises:
      TypeError: `text` is neither text nor a pattern.
      ValueError: the text does not parse, or not 1 <= N <= M.

    >>> parse_pattern("2:4")
    NM(n=2, m=4, flatten='channel')
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise TypeError(
            f'a pattern is text such as "2:4" or an nmjax.NM, got {text!r} of type '
            f"{type(text).__name__}"
        )
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(
            f'cannot read {text!r} as a pattern; write "N:M" with N kept of every M weights, such '
            'as "2:4" or "1:16", or "N:M/kernel" to group over a whole convolution filter'
        )
    n, m, flatten = match.groups()
    return NM(int(n), int(m), flatten="kernel" if flatten == "kernel" else "channel")
