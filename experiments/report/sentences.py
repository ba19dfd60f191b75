"""Sentences about a run: its recipe, its size next to the paper's, and what explains its numbers.

Everything that a sentence says about results is computed from them.
"""

from __future__ import annotations

from experiments.report.claims import better
from experiments.report.numbers import Run

# The paper's recipe on ImageNet: 120 epochs of 5,004 steps. A cosine from 0.1 has a mean of 0.05.
PAPER_STEPS = 120 * 5004
PAPER_LAMBDA_W = 2e-4
PAPER_PULL = PAPER_LAMBDA_W * PAPER_STEPS * 0.05

_DECAYS = {
    "cosine": "a cosine to zero",
    "linear": "a linear decay to zero",
    "inverse_sqrt": "the inverse square root of the step",
}


def recipe_sentence(run: Run) -> str:
    """How all methods were trained."""
    recipe = run.settings["recipe"]
    optimizer = f"SGD with momentum {recipe['momentum']:g}"
    if recipe["optimizer"] == "adamw":
        optimizer = f"AdamW with betas {recipe['momentum']:g} and {recipe['second_momentum']:g}"
    clip = f", gradients clipped to a norm of {recipe['clip']:g}" if recipe["clip"] else ""
    return (
        f"All methods train for the same number of steps with {optimizer}{clip}, batch size "
        f"{recipe['batch_size']} and weight decay {recipe['weight_decay']:g}. The learning rate "
        f"rises to {recipe['learning_rate']:g} by epoch {recipe['warmup_epochs']:.3g} and then "
        f"follows {_DECAYS[recipe['schedule']]}."
    )


def scale_sentence(run: Run) -> str:
    """How the size of the run compares with the paper's."""
    steps = run.settings["recipe"]["epochs"] * run.settings["steps_per_epoch"]
    return (
        f"This run takes {steps:,} optimizer steps on a network of {run.settings['parameters']:,} "
        f"parameters; the paper's ImageNet runs take {PAPER_STEPS:,} steps on networks of 11.7 and "
        "25.6 million."
    )


def pull_sentences(run: Run) -> list[str]:
    """What the strength of the pull means with this optimizer, and which one was used."""
    recipe = run.settings["recipe"]
    shrinks = "shrinks a pruned weight by a factor of 1 - learning rate * λ in each step"
    if recipe["optimizer"] == "adamw":
        sentences = [
            "Adam divides the gradient, including the pull, by the root of its second moment, so "
            "the pull on a pruned weight depends on its gradients as well as on its size. Hu et "
            "al. (ICML 2024) use 6e-5 and 2e-4 with AdamW on GPT-2 of four sizes; SR-STE in the "
            f"table uses {recipe['lambda_w']:.3g}.",
        ]
        if any(row.method == "sr_ste_decoupled" for row in run.part("main")):
            after = recipe["lambda_decoupled"]
            sentences.append(
                f"After the preconditioner the pull {shrinks}, as AdamW's weight decay does. The "
                f"table uses {after:.3g}: learning rate * λ adds up to {run.total_pull(after):.2g} "
                f"over all steps, against {PAPER_PULL:.1f} in the paper's ImageNet recipe."
            )
        return sentences
    chosen = recipe["lambda_w"]
    return [
        f"The pull {shrinks}, so what counts is the sum of learning rate * λ over all steps: "
        f"{PAPER_PULL:.1f} in the paper's ImageNet recipe with λ = 2e-4. (Momentum multiplies it "
        f"by {1 / (1 - recipe['momentum']):.3g} here and by 10 there.) In this run λ = 2e-4 adds "
        f"up to {run.total_pull(PAPER_LAMBDA_W):.2g}; SR-STE in the table uses {chosen:.3g}, which "
        f"adds up to {run.total_pull(chosen):.2g}.",
    ]


def headline(run: Run, pattern: str) -> str:
    """Which of SR-STE and STE is ahead at a pattern; empty where one is missing."""
    ste, refined = run.find(pattern, "ste"), run.find(pattern, "sr_ste")
    if ste is None or refined is None:
        return ""
    words = {"higher": "ahead of", "lower": "behind", "unclear": "not clearly different from"}
    ahead = words[better(run, refined, ste)]
    return f"SR-STE is {ahead} STE: {run.gap(refined, ste)}, paired by seed."


def reasons(run: Run, pattern: str) -> list[str]:
    """Sentences that explain the headline at a pattern, if the run measured the numbers."""
    dense, ste, refined = (run.find(pattern, name) for name in ("dense", "ste", "sr_ste"))
    if dense is None or ste is None or refined is None:
        return []
    gap = f"The difference between STE and dense is {run.gap(ste, dense)}."
    if better(run, ste, dense) == "lower" and better(run, refined, ste) == "higher":
        # The tests have settled the signs.
        lost, won = (
            abs(row.numbers["metric"].minus(ste.numbers["metric"]).mean) for row in (dense, refined)
        )
        metric = run.metric
        won_back = f"{metric.scale * won:.{metric.digits}f} {metric.step}"
        gap += f" SR-STE wins back {won_back} of it, {100 * won / lost:.0f}%."
    # One exchange changes two mask entries.
    kept = ste.numbers["density"].mean
    shares = [50 * row.numbers["flip_rate"].mean / kept for row in (dense, ste, refined)]
    times = f" ({shares[1] / shares[0]:.1f} times as many)" if shares[0] > 0 else ""
    churn = (
        f"One step exchanges {shares[0]:.2g}% of the kept weights with dense training, "
        f"{shares[1]:.2g}% with STE{times} and {shares[2]:.2g}% with SR-STE."
    )
    return [churn, gap]
