"""Why the numbers of a comparison are what they are, as far as its own measurements tell."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.findings import (
    Data,
    Row,
    Summary,
    curve,
    find_row_of,
    in_words,
    rows,
    sweep_rows,
    total_pull,
)

# What the paper's recipe on ImageNet comes to: 120 epochs of 5,004 steps.
PAPER_STEPS = 120 * 5004
PAPER_LAMBDA_W = 2e-4
PAPER_PULL = PAPER_LAMBDA_W * PAPER_STEPS * 0.05
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
    found = []
    for pattern in dict.fromkeys(row.pattern for row in table):
        ste, refined = (find_row_of(table, pattern, name) for name in ("ste", "sr_ste"))
        if ste is not None and refined is not None:
            dense = find_row_of(table, pattern, "dense")
            found.append(_reasons_at(data, pattern, dense, ste, refined))
    return found


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
    sentences = [
        "A pruned weight shrinks by a factor 1 - lr * lambda_w in a step, so what counts is the "
        "sum of lr * lambda_w over all steps. With the paper's 2e-4, peak 0.1 and "
        f"{PAPER_STEPS:,} steps that sum is {PAPER_PULL:.1f} (momentum multiplies "
        "it by ten, there and here).",
        f"Here the same 2e-4 sums to {total_pull(data, PAPER_LAMBDA_W):.2g} only. The table's "
        f"SR-STE uses {chosen:.3g}, a sum of {total_pull(data, chosen):.2g}.",
    ]
    table = sweep_rows(data)
    zero = [row for row in table if row.lambda_w == 0]
    for row in table if zero else []:
        pull = total_pull(data, row.lambda_w)
        if row.lambda_w == PAPER_LAMBDA_W:
            name = "the literal 2e-4"
        elif abs(pull / PAPER_PULL - 1) < 0.1:
            name = f"the paper's sum (lambda_w {row.lambda_w:.3g})"
        else:
            continue
        gain = in_words("metric", row.metric.minus(zero[0].metric))
        sentences.append(f"Measured, {name} is at {gain} against STE.")
    return sentences


def _reasons_at(data: Data, pattern: str, dense: Row | None, ste: Row, refined: Row) -> Reasons:
    gain = refined.metric.minus(ste.metric)
    words = {"higher": "ahead of", "lower": "behind", "unclear": "not clearly different from"}
    headline = f"SR-STE is {words[gain.verdict()]} STE: {in_words('metric', gain)}, paired by seed."
    if dense is None:
        return Reasons(pattern, headline, [])
    gap = ste.metric.minus(dense.metric)
    sentences = [
        _churn_sentence(dense, ste, refined),
        f"STE ends {in_words('metric', gap)} against dense; that is what SR-STE could win back.",
    ]
    if gain.verdict() == "higher":
        share = f", {100 * gain.mean / -gap.mean:.0f} % of it" if gap.mean < 0 else ""
        sentences.append(f"It wins back {100 * gain.mean:.2f} points{share}.")
        sentences += _rest_sentences(data, pattern)
    else:
        sentences += _no_gain_sentences(ste, refined, gap)
    sentences += _sweep_sentences(data, ste, refined)
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
            "can hardly show."
        )
    if refined.sad.minus(ste.sad).verdict() == "lower":
        moved = f"SAD {100 * refined.sad.mean:.1f} % against {100 * ste.sad.mean:.1f} %"
        sentences.append(
            "The pull has a price: it holds the network near the topology that it began with, "
            f"which was random ({moved})."
        )
    return sentences


def _sweep_sentences(data: Data, ste: Row, refined: Row) -> list[str]:
    """What the best strength of the sweep would have given, where it is not the table's."""
    swept = [row for row in sweep_rows(data) if row.pattern == ste.pattern and row.lambda_w > 0]
    best = max(swept, key=lambda row: row.metric.mean, default=refined)
    if best.lambda_w == refined.lambda_w:
        return []
    gain = in_words("metric", best.metric.minus(ste.metric))
    return [
        f"In the sweep below, lambda_w = {best.lambda_w:.2g} does best, {gain} against STE; picked "
        "after the fact, so take it as an upper end."
    ]
