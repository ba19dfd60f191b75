"""Why the numbers of a comparison are what they are, as far as its own measurements tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.findings import (
    Data,
    Row,
    Summary,
    curve,
    find_row_of,
    rows,
    sweep_rows,
    total_pull,
)

# What the paper's recipe on ImageNet comes to: 120 epochs of 5,004 steps.
PAPER_STEPS = 120 * 5004
_SMALL_GAP = 0.01  # one point of accuracy


@dataclass(frozen=True)
class Reasons:
    """An explanation for one pattern.

    Attributes:
      pattern: such as "2:4".
      headline: which method is ahead, with the paired difference.
      sentences: of the explanation.
    """

    pattern: str
    headline: str
    sentences: list[str]


def reasons(data: Data) -> list[Reasons]:
    """One explanation for each pattern at which both STE and SR-STE were trained."""
    table = rows(data)
    return [
        _reasons_at(data, table, pattern)
        for pattern in dict.fromkeys(row.pattern for row in table)
        if find_row_of(table, pattern, "ste") and find_row_of(table, pattern, "sr_ste")
    ]


def scale_sentence(data: Data) -> str:
    """How much smaller this run is than the paper's."""
    settings = data["settings"]
    steps = settings["recipe"]["epochs"] * settings["steps_per_epoch"]
    return (
        f"This run takes {steps:,} optimizer steps on a network of {settings['parameters']:,} "
        f"parameters; the paper's ImageNet runs take {PAPER_STEPS:,} steps on networks of 11.7 and "
        "25.6 million. Effects that need long training or large networks cannot show here."
    )


def pull_sentences(data: Data) -> list[str]:
    """How lambda_w was chosen, and what the paper's own number does here."""
    chosen = data["settings"]["recipe"]["lambda_w"]
    paper = 2e-4
    sentences = [
        "A pruned weight shrinks by a factor 1 - lr * lambda_w in a step, so what counts is the sum "
        "of lr * lambda_w over all steps. With the paper's 2e-4, peak 0.1 and "
        f"{PAPER_STEPS:,} steps that sum is {paper * PAPER_STEPS * 0.05:.1f} (momentum multiplies "
        "it by ten, there and here).",
        f"Here the same 2e-4 would sum to {total_pull(data, paper):.3f} only. The table's SR-STE "
        f"uses {chosen:.3g}, a sum of {total_pull(data, chosen):.1f}.",
    ]
    swept = {row.lambda_w: row for row in sweep_rows(data)}
    if 0.0 in swept and paper in swept:
        gain = swept[paper].metric.minus(swept[0.0].metric)
        sentences.append(f"Measured, the literal 2e-4 is {_points(gain)} against STE.")
    return sentences


def _reasons_at(data: Data, table: list[Row], pattern: str) -> Reasons:
    ste, refined = (find_row_of(table, pattern, name) for name in ("ste", "sr_ste"))
    assert ste is not None and refined is not None
    gain = refined.metric.minus(ste.metric)
    words = {"higher": "ahead of", "lower": "behind", "unclear": "not clearly different from"}
    headline = f"SR-STE is {words[gain.verdict()]} STE: {_points(gain)}, paired by seed."
    dense = find_row_of(table, pattern, "dense")
    if dense is None:
        return Reasons(pattern, headline, [])
    gap = ste.metric.minus(dense.metric)
    sentences = [
        _churn_sentence(dense, ste, refined),
        f"STE ends {_points(gap)} against dense; that is what SR-STE could win back.",
    ]
    if gain.verdict() == "higher":
        share = f", {100 * gain.mean / -gap.mean:.0f} % of it" if gap.mean < 0 else ""
        sentences.append(f"It wins back {100 * gain.mean:.2f} points{share}.")
        sentences += _rest_sentences(data, pattern)
    else:
        sentences += _no_gain_sentences(ste, refined, gap)
    return Reasons(pattern, headline, sentences)


def _churn_sentence(dense: Row, ste: Row, refined: Row) -> str:
    """What part of the kept weights a step exchanges; one exchange flips two entries."""
    shares = [100 * row.flip_rate.mean / 2 / ste.density.mean for row in (dense, ste, refined)]
    times = f" ({shares[1] / shares[0]:.1f} times as many)" if shares[0] > 0 else ""
    return (
        f"A step exchanges {shares[0]:.2g} % of the weights that would be kept when the forward "
        f"pass is dense, {shares[1]:.2g} % under STE{times}, {shares[2]:.2g} % under SR-STE."
    )


def _rest_sentences(data: Data, pattern: str) -> list[str]:
    """Whether the distance to dense that is left is one of fit or of generalisation."""
    losses = {
        t["method"]: Summary(tuple(curve(t, "train_loss")[:, -1]))
        for t in data["trials"]
        if t["part"] == "main" and t["pattern"] == pattern and not t["error"]
    }
    difference = losses["sr_ste"].minus(losses["dense"])
    if difference.verdict() != "higher":
        return []
    return [
        f"What is left of the distance is one of fit: SR-STE's training loss ends at "
        f"{losses['sr_ste'].mean:.3f}, dense training's at {losses['dense'].mean:.3f}. A network "
        "this small, pruned this far, lacks the weights."
    ]


def _no_gain_sentences(ste: Row, refined: Row, gap: Summary) -> list[str]:
    sentences = []
    if gap.verdict() == "unclear" or abs(gap.mean) < _SMALL_GAP:
        sentences.append(
            "There is little to win back at this pattern: plain STE is already within "
            f"{100 * max(abs(gap.mean), gap.error):.1f} points of dense, so the paper's ordering "
            "cannot show."
        )
    moved = refined.sad.minus(ste.sad)
    if moved.verdict() == "lower":
        sentences.append(
            "The pull has a price: it holds the network near the topology that it began with, which "
            f"was random (SAD {100 * refined.sad.mean:.1f} % against {100 * ste.sad.mean:.1f} %)."
        )
    return sentences


def _points(difference: Summary) -> str:
    return f"{100 * difference.mean:+.2f} ± {100 * difference.error:.2f} points"


def best_strength(data: Data) -> Row | None:
    """The row of the sweep with the highest metric."""
    table = sweep_rows(data)
    return table[int(np.argmax([row.metric.mean for row in table]))] if table else None
