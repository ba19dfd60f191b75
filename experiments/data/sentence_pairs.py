"""Sentences and their translations as arrays of tokens of one length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.data.batches import Batch, Rows
from experiments.data.epochs import pad_batch
from experiments.data.vocabulary import BEGIN, END, PADDING, Vocabulary

Tokens = NDArray[np.uint16]
Pair = tuple[str, str]

# Pairs that are encoded in one call, so that not all of them are Python lists at once.
_CHUNK = 8192


class EncodedPairs(NamedTuple):
    """Pairs that fit, as tokens; each row ends with `END` and is filled up with `PADDING`.

    Attributes:
      source: (pairs, length).
      target: (pairs, length).
      kept: (pairs,), which of the given pairs they are.
      empty: how many were left out because one side has no words.
      too_long: how many were left out because one side has more than `length` tokens.
    """

    source: Tokens
    target: Tokens
    kept: NDArray[np.int64]
    empty: int
    too_long: int

    def note(self, name: str) -> str:
        """A sentence about what is there and what was left out."""
        return (
            f"{len(self.source):,} {name} pairs of at most {self.source.shape[1]} tokens a side; "
            f"left out: {self.empty:,} with an empty side, {self.too_long:,} too long."
        )


def encode_pairs(pairs: Iterable[Pair], vocabulary: Vocabulary, *, length: int) -> EncodedPairs:
    """Encodes pairs, leaves out those that are empty or too long, and counts them.

    Args:
      pairs: source and target; read once.
      vocabulary: of both languages, of at most 65,536 pieces.
      length: most tokens of a side, its end among them.

    Raises:
      ValueError: if no pair is left, or the vocabulary is too large.
    """
    if len(vocabulary) > 2**16:
        raise ValueError(f"{len(vocabulary)} pieces do not fit 16 bits; take at most {2**16}")
    parts: list[tuple[NDArray[np.int64], Tokens, Tokens]] = []
    empty, too_long, seen = 0, 0, 0
    for chunk in _chunks(pairs):
        sides = [vocabulary.encode([pair[side].strip() for pair in chunk]) for side in (0, 1)]
        lengths = np.array([[len(row) for row in side] for side in sides])
        # `>=`, because the end takes one more token.
        is_empty, is_long = (lengths == 0).any(axis=0), (lengths >= length).any(axis=0)
        kept = np.flatnonzero(~is_empty & ~is_long)
        source, target = (_fill([side[i] for i in kept], length) for side in sides)
        parts.append((kept + seen, source, target))
        empty, too_long = empty + int(is_empty.sum()), too_long + int((is_long & ~is_empty).sum())
        seen += len(chunk)
    if not any(len(part[0]) for part in parts):
        raise ValueError(
            f"no pairs are left of {seen}: {empty} have an empty side, {too_long} have more than "
            f"{length} tokens on one. Use longer sequences or a larger vocabulary"
        )
    indices, sources, targets = zip(*parts, strict=True)
    return EncodedPairs(
        np.concatenate(sources),
        np.concatenate(targets),
        np.concatenate(indices),
        empty,
        too_long,
    )


def training_batches(
    pairs: EncodedPairs,
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    first_step: int = 0,
    rows: Rows | None = None,
) -> Iterator[Batch]:
    """Every pair at most once, in an order that depends on seed and epoch.

    "source" and "target" are (batch, length) int32. Batches before `first_step`, and rows of a
    batch other than `rows`, are not read.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(pairs.source))
    for start in range(first_step * batch_size, len(order) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield _batch(pairs, chosen if rows is None else chosen[rows])


def evaluation_batches(
    pairs: EncodedPairs, batch_size: int, *, rows_of: Callable[[int], Rows] = np.arange
) -> Iterator[Batch]:
    """Every pair once, with "index" (batch,) int32 and "valid", 0 where the last is filled up.

    Of each batch the rows `rows_of(batch_size)`; those from the batch size on are padding.
    """
    rows = rows_of(batch_size)
    for start in range(0, len(pairs.source), batch_size):
        index = start + rows[rows < min(batch_size, len(pairs.source) - start)]
        batch = {**_batch(pairs, index), "index": index.astype(np.int32)}
        yield pad_batch(batch, len(rows))


def shifted(target: np.ndarray) -> np.ndarray:
    """What a decoder reads to predict `target`: the begin, and all but the last token."""
    # The last token is dropped, since nothing is predicted after it.
    return np.concatenate([np.full_like(target[:, :1], BEGIN), target[:, :-1]], axis=1)


def _batch(pairs: EncodedPairs, rows: np.ndarray) -> Batch:
    target = pairs.target[rows].astype(np.int32)
    return {
        "source": pairs.source[rows].astype(np.int32),
        "read": shifted(target),
        "target": target,
    }


def _chunks(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    iterator = iter(pairs)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _fill(rows: list[list[int]], length: int) -> Tokens:
    # 16 bits halve the memory: WMT14 has four and a half million pairs.
    filled = np.full((len(rows), length), PADDING, np.uint16)
    for index, row in enumerate(rows):
        filled[index, : len(row) + 1] = [*row, END]
    return filled
