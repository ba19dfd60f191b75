"""Why the numbers of a comparison are what they are, as far as its own measurements tell."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.report.findings import (
    Data,
    Row,
    Summary,
    curve,
    find_row_of,
    in_words,
    metric_of,
    rows,
    sweep_rows,
    total_pull,
)
from experiments.tasks.task import Metric

# What the paper's recipe on ImageNet comes to: 120 epochs of 5,004 steps.
PAPER_STEPS = 120 * 5004
PAPER_LAMBDA_W = 2e-4
PAPER_PULL = PAPER_LAMBDA_W * PAPER_STEPS * 0.05


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
    recipe = data["settings"]["recipe"]
    if recipe["optimizer"] == "adamw":
        return _adam_sentences(data)
    chosen = recipe["lambda_w"]
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
        gain = in_words("metric", row.metric.minus(zero[0].metric), metric_of(data))
        sentences.append(f"Measured, {name} is at {gain} against STE.")
    return sentences


def _adam_sentences(data: Data) -> list[str]:
    recipe = data["settings"]["recipe"]
    before, after = recipe["lambda_w"], recipe["lambda_decoupled"]
    sentences = [
        "Adam divides the gradient, and with it SR-STE's term, by the root of the gradient's "
        "second moment, so how far a pruned weight is pulled in a step depends on its gradients "
        "and not on its size alone. Published strengths of the term as a part of AdamW's gradient "
        "are 6e-5 and 2e-4 (Hu et al., ICML 2024, GPT-2 of four sizes).",
        f"The table's SR-STE uses {before:.3g}.",
    ]
    if any(row.method == "sr_ste_decoupled" for row in rows(data)):
        sentences.append(
            "After the preconditioner a step shrinks a pruned weight by a factor 1 - lr * "
            f"lambda_w, as AdamW's weight decay does. The table's uses {after:.3g}: the sum of "
            f"lr * lambda_w over all steps is {total_pull(data, after):.2g}, where the paper's "
            f"recipe for ImageNet has {PAPER_PULL:.1f}."
        )
    return sentences


def _reasons_at(data: Data, pattern: str, dense: Row | None, ste: Row, refined: Row) -> Reasons:
    metric = metric_of(data)
    change = refined.metric.minus(ste.metric)
    gain = change.times(metric.sign)
    words = {"higher": "ahead of", "lower": "behind", "unclear": "not clearly different from"}
    headline = (
        f"SR-STE is {words[gain.verdict()]} STE: {in_words('metric', change, metric)}, paired by "
        "seed."
    )
    if dense is None:
        return Reasons(pattern, headline, [])
    gap = ste.metric.minus(dense.metric)
    lost = -metric.sign * gap.mean
    sentences = [
        _churn_sentence(dense, ste, refined),
        f"STE ends {in_words('metric', gap, metric)} against dense; that is what SR-STE could win "
        "back.",
    ]
    if gain.verdict() == "higher":
        share = f", {100 * gain.mean / lost:.0f} % of it" if lost > 0 else ""
        won = f"{metric.scale * gain.mean:.{metric.digits}f} {metric.step}"
        sentences.append(f"It wins back {won}{share}.")
        sentences += _rest_sentences(data, pattern)
    else:
        sentences += _no_gain_sentences(ste, refined, gap, metric)
    sentences += _sweep_sentences(data, ste, refined)
    sentences += _decoupled_sentences(data, refined)
    return Reasons(pattern, headline, sentences)


def _decoupled_sentences(data: Data, refined: Row) -> list[str]:
    """What the place of the term in the optimizer changes."""
    after = find_row_of(rows(data), refined.pattern, "sr_ste_decoupled")
    if after is None:
        return []
    change = in_words("metric", after.metric.minus(refined.metric), metric_of(data))
    return [f"With the pull after the preconditioner SR-STE ends {change} against before it."]


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


def _no_gain_sentences(ste: Row, refined: Row, gap: Summary, metric: Metric) -> list[str]:
    sentences = []
    if gap.verdict() == "unclear" or abs(gap.mean) < metric.close:
        away = metric.scale * max(abs(gap.mean), gap.error)
        sentences.append(
            "There is little to win back at this pattern: plain STE is already within "
            f"{away:.{metric.digits - 1}f} {metric.step} of dense, so the paper's ordering can "
            "hardly show."
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
    metric = metric_of(data)
    swept = [row for row in sweep_rows(data) if row.pattern == ste.pattern and row.lambda_w > 0]
    best = max(swept, key=lambda row: metric.sign * row.metric.mean, default=refined)
    if best.lambda_w == refined.lambda_w:
        return []
    gain = in_words("metric", best.metric.minus(ste.metric), metric)
    return [
        f"In the sweep below, lambda_w = {best.lambda_w:.2g} does best, {gain} against STE; picked "
        "after the fact, so take it as an upper end."
    ]
