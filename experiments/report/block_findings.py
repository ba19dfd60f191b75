"""What the results say about 1xN blocks: tables, balance of work, and the papers' claims.

Everything is computed from the content of `results.json`; no conclusion is written down anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.report.findings import (
    Claim,
    Comparison,
    Data,
    Entry,
    Row,
    Summary,
    Verdict,
    curve,
    in_words,
    metric_of,
    ordering,
    present,
    rows,
)


@dataclass(frozen=True)
class BlockRow:
    """One row of the table of a block pattern.

    Attributes:
      row: the numbers that every method has.
      layer: the layer with the most blocks; empty for methods without block masks.
      kept: fewest and most blocks that a row of that layer keeps, over all seeds, and how many
        there are.
      balance: mean over a layer's rows of the blocks kept, over their maximum, mean over the
        layers; 1 where all rows keep equally many. None for methods without block masks.
      regrown: blocks that came back in an epoch, mean over the epochs; None like `balance`.
    """

    row: Row
    layer: str = ""
    kept: tuple[int, int, int] = (0, 0, 0)
    balance: Summary | None = None
    regrown: Summary | None = None


def block_tables(data: Data) -> dict[str, list[BlockRow]]:
    """Block pattern -> its rows, after those of N:M methods at the same density."""
    table = rows(data, "blocks")
    found = {}
    for pattern in dict.fromkeys(row.pattern for row in table):
        here = [_block_row(data, row) for row in table if row.pattern == pattern]
        found[pattern] = [*(BlockRow(row) for row in beside(data, pattern)), *here]
    return found


def beside(data: Data, pattern: str) -> list[Row]:
    """What a block pattern is compared with: dense, and SR-STE at the same density."""
    density = data["settings"]["density"]
    trained = [*rows(data), *rows(data, "beside")]
    dense = [row for row in trained if row.method == "dense"][:1]
    equal = [
        row
        for row in trained
        if row.method == "sr_ste" and np.isclose(density[row.pattern], density[pattern])
    ]
    return dense + equal


def block_entries(data: Data, pattern: str | None = None) -> list[Entry]:
    """The trials of block patterns that came to an end, of one pattern or of all."""
    return [
        entry
        for entry in data["trials"]
        if entry["part"] == "blocks" and not entry["error"]
        if pattern in (None, entry["pattern"])
    ]


def remembers_blocks(entry: Entry) -> bool:
    """Whether the method of a trial remembers masks of blocks, which were then measured."""
    return "regrown" in entry["epochs"][-1]


def kept_rows(entry: Entry) -> dict[str, np.ndarray]:
    """Layer -> blocks kept in each row at the end of a trial, (seeds, rows)."""
    last = entry["epochs"][-1]["kept_rows"]
    return {layer: np.array(kept) for layer, kept in last.items()}


def balance(kept: np.ndarray) -> np.ndarray:
    """Mean over the rows over their maximum, (..., rows) -> (...): 1 is perfect balance."""
    return kept.mean(axis=-1) / kept.max(axis=-1)


def speed_up_bound(kept: np.ndarray, threads: int) -> np.ndarray:
    """How many times as fast `threads` threads can be as one, if each takes as many rows.

    The slowest thread decides: total work over the largest sum of a thread's rows. Rows are dealt
    out in their order, as evenly as they go.

    Args:
      kept: blocks in each row, (..., rows).
      threads: at least 1.

    Returns:
      (...), at most `threads`.

    >>> speed_up_bound(np.array([1, 3, 2, 2]), 2).item()
    2.0
    >>> speed_up_bound(np.array([1, 3, 2, 2]), 4).item()  # 8 blocks, and one thread has 3
    2.6666666666666665
    """
    parts = np.array_split(kept, min(threads, kept.shape[-1]), axis=-1)
    slowest = np.max([part.sum(axis=-1) for part in parts], axis=0)
    return np.asarray(kept.sum(axis=-1) / slowest)


# (method, compared with, column, expected direction, sentence)
_ORDERINGS: tuple[tuple[str, str, str, Verdict, str], ...] = (
    ("subp", "one_by_n", "metric", "higher", "SUBP is better than one-shot 1xN"),
    ("subp", "one_by_n", "loss", "lower", "SUBP has a lower loss than one-shot 1xN"),
    ("subp_l1", "one_by_n", "loss", "lower", "So it has when blocks are ranked by L1 norm"),
    ("subp", "subp_l1", "metric", "higher", "Ranking by angle too is better than by norm"),
    ("subp", "subp_l1", "loss", "lower", "Ranking by angle too has a lower loss than by norm"),
)


def block_claims(data: Data) -> list[Claim]:
    """What the paper on SUBP found or builds on, next to what this run found."""
    table, metric = rows(data, "blocks"), metric_of(data)
    patterns = list(dict.fromkeys(row.pattern for row in table))
    found = []
    for method, other, column, expected, says in _ORDERINGS:
        at = {p: ordering(table, p, method, other, column, expected, metric) for p in patterns}
        found.append(Claim(says, present(at)))
    balanced = {pattern: _balanced(data, pattern) for pattern in patterns}
    found.append(Claim("SUBP gives every row equal work, one-shot 1xN does not", present(balanced)))
    return [claim for claim in found if claim.at]


def price_sentences(data: Data) -> list[str]:
    """What blocks cost in accuracy against N:M at the same density, where both were trained."""
    sentences = []
    for ours in rows(data, "blocks"):
        for row in beside(data, ours.pattern) if ours.method == "subp" else ():
            if row.method != "dense":
                gap = in_words("metric", ours.metric.minus(row.metric), metric_of(data))
                sentences.append(
                    f"SUBP at {ours.pattern} ends {gap} against SR-STE at {row.pattern}, which "
                    "keeps as many weights one by one."
                )
    return sentences


def _balanced(data: Data, pattern: str) -> Comparison | None:
    found = {entry["method"]: entry for entry in block_entries(data, pattern)}
    if not {"subp", "one_by_n"} <= found.keys():
        return None
    ours, theirs = (_balance(found[name]) for name in ("subp", "one_by_n"))
    is_seen = min(ours.values) == 1 and max(theirs.values) < 1
    here = f"balance {100 * ours.mean:.0f} % and {100 * theirs.mean:.0f} %"
    return Comparison(here, "seen" if is_seen else "not seen")


def _balance(entry: Entry) -> Summary:
    """Of each seed, mean over the layers."""
    layers = [balance(kept) for kept in kept_rows(entry).values()]
    return Summary(tuple(np.mean(layers, axis=0).tolist()))


def _block_row(data: Data, row: Row) -> BlockRow:
    entries = block_entries(data, row.pattern)
    entry = next(entry for entry in entries if entry["method"] == row.method)
    if not remembers_blocks(entry):
        return BlockRow(row)
    kept = kept_rows(entry)
    layer = largest_layer(data, row.pattern)
    inputs = data["settings"]["blocks"][row.pattern][layer]
    fewest, most = int(kept[layer].min()), int(kept[layer].max())
    regrown = Summary(tuple(curve(entry, "regrown").mean(axis=1)))
    return BlockRow(row, layer, (fewest, most, inputs), _balance(entry), regrown)


def largest_layer(data: Data, pattern: str) -> str:
    """The layer with the most weights, and so with the most blocks; the last of equal ones."""
    weights = data["settings"]["weights"][pattern]
    return max(reversed(list(weights)), key=lambda layer: weights[layer])
