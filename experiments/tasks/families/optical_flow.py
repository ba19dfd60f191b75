"""What every optical flow task shares: sequence loss, end-point error, outlier rates, pictures.

Source: Teed and Deng, "RAFT", ECCV 2020; the rates are those of its released evaluation and of
KITTI 2015 ("outlier").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.images import Pixels, image_uri
from experiments.models.flow.raft import Raft
from experiments.tasks.families.flow_colors import flow_to_colors
from experiments.tasks.task import Batch, Metric, Recipe, Shown, Sums, Task, Variables

Array: TypeAlias = jax.Array | np.ndarray

# RAFT's: weight of a step against the next, and the longest flow that is learned from, in pixels.
GAMMA = 0.8
LONGEST_FLOW = 400.0
# Layers that see 3 or 2 channels, which no group of four fits into.
KEEP_DENSE = ("/stem/", "/flow1/")

METRICS = (
    Metric("EPE", unit="px", perfect=0.0, scale=1.0, close=0.1),
    Metric("over 1 px", perfect=0.0),
    Metric("over 3 px", perfect=0.0),
    Metric("outliers", perfect=0.0),
)

# KITTI's: an outlier is off by more than this many pixels and this part of the true length.
_OUTLIER_PIXELS, _OUTLIER_SHARE = 3.0, 0.05

# How many test pairs are drawn in a report.
_SHOWN = 4


def optical_flow_task(
    *,
    name: str,
    model: Raft,
    train_batches: Callable[[int, int], Iterator[Batch]],
    eval_batches: Callable[[], Iterator[Batch]],
    steps_per_epoch: int,
    recipe: Recipe,
    eval_iterations: int | None = None,
    **described: Any,
) -> Task:
    """Makes the task of estimating the flow between two images with RAFT.

    Training minimizes `sequence_loss`; evaluation sums what `flow_sums` says.

    Args:
      name: of the task.
      model: see `experiments.models.flow.raft`.
      train_batches: `(seed, epoch) -> batches` with "first" and "second" (batch, height, width,
        3), float32 in [-1, 1], "flow" (batch, height, width, 2), float32 in pixels, and "known"
        (batch, height, width), 1 where the flow is known, else 0.
      eval_batches: `() -> batches`, the same plus "valid" (batch,), 0 where padded.
      steps_per_epoch: how many batches `train_batches` yields.
      recipe: default hyper-parameters.
      eval_iterations: of the network in evaluation; None for as many as in training.
      **described: other fields of `Task`.

    Returns:
      The task.
    """
    # The same parameters take any number of steps.
    evaluated = replace(model, iterations=eval_iterations or model.iterations)
    return Task(
        name=name,
        init=partial(_init, model),
        loss=partial(_loss, model),
        evaluate=partial(_evaluate, evaluated),
        train_batches=train_batches,
        eval_batches=eval_batches,
        steps_per_epoch=steps_per_epoch,
        recipe=recipe,
        keep_dense=KEEP_DENSE,
        metrics=METRICS,
        show=partial(_show, evaluated, eval_batches),
        **described,
    )


def sequence_loss(flows: Array, truth: Array, known: Array) -> jax.Array:
    """Returns sum_i gamma^(steps - 1 - i) mean |flow_i - truth|_1, gamma = 0.8.

    The mean is over all pixels and both components; pixels that are unknown, or move further than
    400 pixels, count as zero, as in the released code.

    Args:
      flows: (steps, batch, height, width, 2).
      truth: (batch, height, width, 2).
      known: (batch, height, width), not 0 where the truth is known.
    """
    counts = (known != 0) & (jnp.linalg.norm(truth, axis=-1) < LONGEST_FLOW)
    # `where` on both sides: an unknown pixel may hold anything, and 0 * inf is NaN.
    errors = jnp.abs(flows - jnp.where(counts[..., None], truth, 0))
    errors = jnp.where(counts[..., None], errors, 0).mean(axis=(1, 2, 3, 4))
    return jnp.sum(GAMMA ** jnp.arange(len(flows) - 1, -1, -1) * errors)


def flow_sums(flow: Array, truth: Array, known: Array, valid: Array) -> Sums:
    """Sums errors over the examples of a batch that are not padding.

    Of an example, over its known pixels: the mean end-point error |flow - truth|_2; the fractions
    of pixels that are off by more than 1, 3 and 5 pixels; the fraction of outliers, off by more
    than 3 pixels and by more than 5% of the true length.

    Args:
      flow: (batch, height, width, 2).
      truth: of the same shape.
      known: (batch, height, width), not 0 where the truth is known.
      valid: (batch,), 0 where the example is padding.

    Returns:
      "count", "loss" (the end-point error again), "EPE", "over 1 px", "over 3 px", "over 5 px",
      "outliers": float32 scalars.
    """
    known = known != 0
    truth = jnp.where(known[..., None], truth, 0)
    error = jnp.linalg.norm(flow - truth, axis=-1)
    length = jnp.linalg.norm(truth, axis=-1)
    outlier = (error > _OUTLIER_PIXELS) & (error > _OUTLIER_SHARE * length)
    pixels = {"loss": error, "EPE": error}
    pixels |= {f"over {limit} px": error > limit for limit in (1, 3, 5)}
    pixels["outliers"] = outlier
    # An example without a known pixel has no error, not an undefined one.
    area = jnp.maximum(known.sum(axis=(1, 2)), 1)
    means = {
        key: jnp.where(known, value, 0).sum(axis=(1, 2)) / area for key, value in pixels.items()
    }
    keep = valid != 0
    sums = {key: jnp.where(keep, mean, 0).sum() for key, mean in means.items()}
    return {"count": keep.sum().astype(jnp.float32), **sums}


def no_motion_error(batches: Iterable[Batch]) -> float:
    """The end-point error over evaluation batches of a flow that is zero everywhere."""
    sums: dict[str, float] = {"EPE": 0.0, "count": 0.0}
    for batch in batches:
        nothing = np.zeros_like(batch["flow"])
        found = flow_sums(nothing, batch["flow"], batch["known"], batch["valid"])
        sums = {name: sums[name] + float(found[name]) for name in sums}
    return sums["EPE"] / sums["count"]


def shown_pairs(batch: Batch, flows: np.ndarray) -> list[Shown]:
    """Draws both images, the true flow and a network's, on one scale a pair.

    Args:
      batch: see `optical_flow_task`.
      flows: (batch, height, width, 2).
    """
    rows = []
    for index, flow in enumerate(flows):
        truth = np.where(batch["known"][index, ..., None] != 0, batch["flow"][index], 0)
        longest = max(float(np.linalg.norm(truth, axis=-1).max()), 1e-6)
        rows.append(
            {
                "first image": image_uri(_pixels(batch["first"][index])),
                "second image": image_uri(_pixels(batch["second"][index])),
                "true flow": image_uri(flow_to_colors(truth, longest)),
                "network": image_uri(flow_to_colors(flow, longest)),
            }
        )
    return rows


def _pixels(image: np.ndarray) -> Pixels:
    """From [-1, 1] to [0, 255]."""
    pixels: Pixels = np.clip(np.rint(127.5 * (image + 1)), 0, 255).astype(np.uint8)
    return pixels


def _init(model: Raft, key: jax.Array) -> Variables:
    # No parameter depends on the images' size; this is the smallest that the pyramid takes.
    side = math.prod(model.strides) * 2 ** (model.levels - 1)
    image = jnp.zeros((1, side, side, 3))
    # Steps share their parameters, and one compiles sooner than all.
    return dict(replace(model, iterations=1).init(key, image, image, train=False))


def _loss(
    model: Raft, params: Any, collections: Variables, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Variables]:
    del key
    flows, updated = model.apply(
        {"params": params, **collections},
        batch["first"],
        batch["second"],
        train=True,
        mutable=list(collections),
    )
    return sequence_loss(flows, batch["flow"], batch["known"]), {**collections, **updated}


def _evaluate(model: Raft, params: Any, collections: Variables, batch: Batch) -> Sums:
    flow = _last_flow(model, params, collections, batch)
    return flow_sums(flow, batch["flow"], batch["known"], batch["valid"])


def _show(
    model: Raft, eval_batches: Callable[[], Iterator[Batch]], params: Any, collections: Variables
) -> list[Shown]:
    batch = {name: values[:_SHOWN] for name, values in next(eval_batches()).items()}
    flow = jax.jit(partial(_last_flow, model))(params, collections, batch)
    return shown_pairs(batch, np.asarray(flow))


def _last_flow(model: Raft, params: Any, collections: Variables, batch: Batch) -> jax.Array:
    flows: Any = model.apply(
        {"params": params, **collections}, batch["first"], batch["second"], train=False
    )
    last: jax.Array = flows[-1]
    return last
