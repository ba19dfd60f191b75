"""What every detection task shares: losses, average precision, drawn boxes and masks.

Source: Ren et al., "Faster R-CNN", NeurIPS 2015; He et al., "Mask R-CNN", ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from experiments.data.images import Pixels, image_uri
from experiments.models.detection.mask_rcnn import Found, MaskRCNN, Objects, mask_stride
from experiments.tasks.families.coco_metrics import Annotated, Kind, average_precision, paste
from experiments.tasks.task import Batch, Metric, Recipe, Shown, Sums, Task, Variables

# Layers that see three channels, which no group of four fits into.
KEEP_DENSE = ("/stem/",)
BOX_METRICS = (Metric("box AP"), Metric("box AP50"))
MASK_METRICS = (Metric("mask AP"), Metric("mask AP50"))

_SHOWN = 4
_SHOWN_SCORE = 0.5
# Okabe and Ito's palette, which color-blind readers can distinguish.
_COLORS = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167)]
)


class Seen(NamedTuple):
    """What scores are made of, besides boxes and classes.

    Attributes:
      found: by the network.
      true_masks: (batch, objects, rows, columns / 8, rounded up) uint8, the true masks with eight
        pixels a byte; None without masks. All of a test set wait until it is scored: COCO's, at a
        byte a pixel, would take 33 GB.
    """

    found: Found
    true_masks: jax.Array | None


def object_detection_task(
    *,
    name: str,
    model: MaskRCNN,
    image_shape: tuple[int, int],
    train_batches: Callable[[int, int], Iterator[Batch]],
    eval_batches: Callable[[], Iterator[Batch]],
    steps_per_epoch: int,
    recipe: Recipe,
    **described: Any,
) -> Task:
    """Makes the task of finding objects in images with Faster or Mask R-CNN.

    Training minimizes the mean over the images of the sum of all losses; evaluation sums the same
    with the running statistics, and measures average precision.

    Args:
      name: of the task.
      model: see `experiments.models.detection.mask_rcnn`.
      image_shape: (height, width).
      train_batches: `(seed, epoch) -> batches` with "image" (batch, *image_shape, 3) float32 in
        [-1, 1], "boxes" (batch, objects, 4) float32, "classes" (batch, objects) int32 from 1, 0
        where padded, and for a model with masks "masks" (batch, objects, rows, columns) uint8,
        as large as the image or smaller by a whole factor, in which they are scored too.
      eval_batches: `() -> batches`, the same plus "valid" (batch,), 0 where padded. May have
        "is_crowd" (batch, objects).
      steps_per_epoch: how many batches `train_batches` yields.
      recipe: default hyper-parameters.
      **described: other fields of `Task`.

    Returns:
      The task.
    """
    return Task(
        name=name,
        init=partial(_init, model, image_shape),
        loss=partial(_loss, model),
        evaluate=partial(_evaluate, model),
        train_batches=train_batches,
        eval_batches=eval_batches,
        steps_per_epoch=steps_per_epoch,
        recipe=recipe,
        keep_dense=KEEP_DENSE,
        metrics=BOX_METRICS + (MASK_METRICS if model.with_masks else ()),
        predict=partial(_predict, model),
        score=partial(detection_scores, image_shape),
        scored_by=("boxes", "classes", "is_crowd"),
        show=partial(_show, model, eval_batches),
        **described,
    )


def detection_scores(
    image_shape: tuple[int, int], batches: list[Batch], predictions: list[Seen]
) -> dict[str, float]:
    """Average precision of boxes and, where there are masks, of masks.

    Masks are compared at the resolution of the true ones, which may be coarser than the image;
    COCO's own evaluation compares them at the original size of each image.

    Args:
      image_shape: (height, width).
      batches: see `object_detection_task`; images and masks are not needed.
      predictions: `Seen` of each batch.
    """
    # pycocotools prefers masks where it gets both, and would score boxes by them.
    boxes_only = [Seen(seen.found._replace(masks=None), None) for seen in predictions]
    boxes = _precision(image_shape, batches, boxes_only, "bbox")
    scores = {f"box {name}": value for name, value in boxes.items()}
    if predictions[0].true_masks is not None:
        masks = _precision(image_shape, batches, predictions, "segm")
        scores |= {f"mask {name}": value for name, value in masks.items()}
    return scores


def true_objects(image_shape: tuple[int, int], batch: Batch) -> list[Annotated]:
    """The objects of each image of a batch, without padding."""
    found = []
    for index, classes in enumerate(batch["classes"]):
        there = classes > 0
        found.append(
            Annotated(
                size=image_shape,
                boxes=batch["boxes"][index][there],
                classes=classes[there],
                masks=batch["masks"][index][there] if "masks" in batch else None,
                is_crowd=batch["is_crowd"][index][there] if "is_crowd" in batch else None,
            )
        )
    return found


def annotated(
    image_shape: tuple[int, int], prediction: Found, *, stride: int = 1
) -> list[Annotated]:
    """The detections of each image of a batch, masks pasted into it.

    Args:
      image_shape: (height, width).
      prediction: for the batch.
      stride: pixels of the image between two of a mask.
    """
    detections, masks = prediction
    found = []
    for index in range(len(detections.classes)):
        boxes, classes, scores = (np.asarray(values[index]) for values in detections)
        there = classes > 0
        pasted = None
        if masks is not None:
            own = np.asarray(masks[index])[there]
            pasted = paste(own, boxes[there], image_shape, stride=stride)
        found.append(
            Annotated(
                size=image_shape,
                boxes=boxes[there],
                classes=classes[there],
                scores=scores[there],
                masks=pasted,
            )
        )
    return found


def shown_images(batch: Batch, found: list[Annotated]) -> list[Shown]:
    """Draws the truth of some images, and what a network found with a score of 0.5 or more."""
    rows, true_found = [], true_objects(batch["image"].shape[1:3], batch)
    for image, true, seen in zip(batch["image"], true_found, found, strict=True):
        pixels = np.clip(np.rint(127.5 * (image + 1)), 0, 255).astype(np.uint8)
        scores = np.ones(len(seen.classes)) if seen.scores is None else seen.scores
        sure = np.flatnonzero(scores >= _SHOWN_SCORE)
        rows.append(
            {
                "truth": image_uri(draw_objects(pixels, true, range(len(true.classes)))),
                "network": image_uri(draw_objects(pixels, seen, sure)),
            }
        )
    return rows


def draw_objects(pixels: Pixels, objects: Annotated, which: Any, enlarge: int = 3) -> Pixels:
    """Draws masks, boxes and classes into an enlarged image.

    Args:
      pixels: (height, width, 3).
      objects: of the image.
      which: indices of those to draw.
      enlarge: how many times.
    """
    canvas = np.repeat(np.repeat(pixels, enlarge, axis=0), enlarge, axis=1).astype(float)
    for index in which:
        if objects.masks is not None:
            # Masks may be coarser than the image, and the canvas is larger.
            side = len(canvas) // objects.masks.shape[1]
            mask = np.kron(objects.masks[index] != 0, np.ones((side, side))) > 0
            canvas[mask] = (canvas[mask] + _color(objects.classes[index])) / 2
    image = Image.fromarray(canvas.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for index in which:
        color = tuple(int(part) for part in _color(objects.classes[index]))
        left, top, right, bottom = (enlarge * float(side) for side in objects.boxes[index])
        # Pillow draws the right and lower edge too, and a box ends before them.
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=color)
        score = "" if objects.scores is None else f" {objects.scores[index]:.2f}"
        draw.text((left + 2, top), f"{objects.classes[index]}{score}", fill=color)
    return np.asarray(image)


def _precision(
    image_shape: tuple[int, int], batches: list[Batch], predictions: list[Seen], kind: Kind
) -> dict[str, float]:
    """Average precision over all images except padding."""

    def valid(images: Iterable[list[Annotated]]) -> Iterator[Annotated]:
        for batch, found in zip(batches, images, strict=True):
            yield from (found[index] for index in np.flatnonzero(batch["valid"]))

    # Generators, so that the whole masks of only one batch exist at a time.
    truth = (_unpacked(image_shape, *pair) for pair in zip(batches, predictions, strict=True))
    found = (
        annotated(image_shape, seen.found, stride=_stride(image_shape, seen.true_masks))
        for seen in predictions
    )
    return average_precision(valid(truth), valid(found), kind)


def _unpacked(image_shape: tuple[int, int], batch: Batch, seen: Seen) -> list[Annotated]:
    """The true objects of each image of a batch that has come without masks."""
    if seen.true_masks is None:
        return true_objects(image_shape, batch)
    columns = image_shape[1] // _stride(image_shape, seen.true_masks)
    # `packbits` filled each row up to whole bytes, which `count` drops.
    masks = np.unpackbits(np.asarray(seen.true_masks), axis=-1, count=columns)
    return true_objects(image_shape, {**batch, "masks": masks})


def _stride(image_shape: tuple[int, int], packed: jax.Array | None) -> int:
    return 1 if packed is None else image_shape[0] // packed.shape[2]


def _objects(batch: Batch) -> Objects:
    masks = jnp.asarray(batch["masks"]) if "masks" in batch else None
    return Objects(jnp.asarray(batch["boxes"]), jnp.asarray(batch["classes"]), masks)


def _color(number: int) -> np.ndarray:
    color: np.ndarray = _COLORS[int(number) % len(_COLORS)]
    return color


def _init(model: MaskRCNN, image_shape: tuple[int, int], key: jax.Array) -> Variables:
    # `find` uses every layer, and needs no true objects.
    return dict(model.init(key, jnp.zeros((1, *image_shape, 3)), method="find"))


def _losses(
    model: MaskRCNN,
    params: Any,
    collections: Variables,
    batch: Batch,
    key: jax.Array,
    *,
    train: bool,
) -> tuple[jax.Array, Variables]:
    """The sum of all losses of each image, (batch,), and the new collections."""
    found, updated = model.apply(
        {"params": params, **collections},
        batch["image"],
        _objects(batch),
        key,
        train,
        mutable=list(collections) if train else [],
        method="losses",
    )
    return sum(found.values()), {**collections, **updated}


def _loss(
    model: MaskRCNN, params: Any, collections: Variables, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Variables]:
    losses, collections = _losses(model, params, collections, batch, key, train=True)
    return losses.mean(), collections


def _evaluate(model: MaskRCNN, params: Any, collections: Variables, batch: Batch) -> Sums:
    # The same samples of anchors and proposals every time.
    key = jax.random.key(0)
    losses, _ = _losses(model, params, collections, batch, key, train=False)
    keep = batch["valid"] != 0
    return {"count": keep.sum().astype(jnp.float32), "loss": jnp.where(keep, losses, 0).sum()}


def _find(model: MaskRCNN, params: Any, collections: Variables, batch: Batch) -> Found:
    found: Any = model.apply({"params": params, **collections}, batch["image"], method="find")
    return Found(*found)


def _predict(model: MaskRCNN, params: Any, collections: Variables, batch: Batch) -> Seen:
    masks = jnp.packbits(batch["masks"], axis=-1) if "masks" in batch else None
    return Seen(_find(model, params, collections, batch), masks)


def _show(
    model: MaskRCNN,
    eval_batches: Callable[[], Iterator[Batch]],
    params: Any,
    collections: Variables,
) -> list[Shown]:
    batch = {name: values[:_SHOWN] for name, values in next(eval_batches()).items()}
    found = jax.device_get(jax.jit(partial(_find, model))(params, collections, batch))
    size = batch["image"].shape[1:3]
    stride = mask_stride(size, batch["masks"].shape[2:]) if "masks" in batch else 1
    return shown_images(batch, annotated(size, found, stride=stride))
