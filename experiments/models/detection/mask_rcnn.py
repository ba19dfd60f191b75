"""Faster R-CNN and Mask R-CNN over a feature pyramid, with static shapes throughout.

The defaults have the layers of torchvision's `fasterrcnn_resnet50_fpn` and, with masks,
`maskrcnn_resnet50_fpn`: 41,755,286 and 44,401,393 parameters at 91 classes. There, batch
normalization is frozen and not counted; here it is trained, which adds its 53,120. The tests count.

Path rules can address every layer: "pyramid/stage2_block1/conv1", "pyramid/lateral1",
"regions/conv", "boxes/hidden1", "masks/conv1".

Source: Ren et al., "Faster R-CNN", NeurIPS 2015; He et al., "Mask R-CNN", ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.detection.boxes import pyramid_anchors
from experiments.models.detection.feature_pyramid import FeaturePyramid
from experiments.models.detection.losses import box_losses, choose, mask_loss, region_losses
from experiments.models.detection.proposals import Detections, detect, propose
from experiments.models.detection.roi_align import level_of, roi_align

# Fast R-CNN, section 2.3, for the classes and box codes; Faster R-CNN, section 3.1.3, for regions.
_narrow_init = nn.initializers.normal(0.01)
_code_init = nn.initializers.normal(0.001)
_mask_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Objects(NamedTuple):
    """The truth about a batch of images.

    Attributes:
      boxes: (batch, objects, 4).
      classes: (batch, objects) int32, from 1; 0 is padding.
      masks: (batch, objects, height / k, width / k), 1 where the object is seen, of images
        (height, width) and any whole k; None if not known.
    """

    boxes: jax.Array
    classes: jax.Array
    masks: jax.Array | None


class Found(NamedTuple):
    """What a network finds in a batch of images.

    Attributes:
      detections: with a leading axis for the batch.
      masks: (batch, n, side, side), probabilities inside of each box; None without a mask head.
    """

    detections: Detections
    masks: jax.Array | None


class RegionHead(nn.Module):
    """Says for each anchor whether it shows an object, and where its box lies."""

    anchors: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps (batch, rows, columns, features) to logits (batch, n) and codes (batch, n, 4)."""
        conv = partial(nn.Conv, kernel_init=_narrow_init)
        y = nn.relu(conv(x.shape[-1], (3, 3), name="conv")(x))
        logits = conv(self.anchors, (1, 1), name="objectness")(y)
        codes = conv(4 * self.anchors, (1, 1), name="codes")(y)
        # Rows, columns, ratios: the order of `pyramid_anchors`.
        return logits.reshape(len(x), -1), codes.reshape(len(x), -1, 4)


class BoxHead(nn.Module):
    """Names a region, and corrects its box, one way for each class."""

    classes: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps (n, size, size, features) to logits (n, classes) and codes (n, classes, 4)."""
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.hidden, name="hidden1")(x))
        x = nn.relu(nn.Dense(self.hidden, name="hidden2")(x))
        logits = nn.Dense(self.classes, kernel_init=_narrow_init, name="classes")(x)
        # The background has codes too, which nothing learns, as in torchvision: one index fits both
        # outputs.
        codes = nn.Dense(4 * self.classes, kernel_init=_code_init, name="codes")(x)
        return logits, codes.reshape(len(x), self.classes, 4)


class MaskHead(nn.Module):
    """Draws the mask of a region, one for each class."""

    classes: int
    convs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, size, size, features) to logits (n, 2 size, 2 size, classes)."""
        width = x.shape[-1]
        for index in range(1, self.convs + 1):
            x = nn.relu(nn.Conv(width, (3, 3), kernel_init=_mask_init, name=f"conv{index}")(x))
        x = nn.ConvTranspose(width, (2, 2), (2, 2), kernel_init=_mask_init, name="enlarge")(x)
        return nn.Conv(self.classes, (1, 1), kernel_init=_mask_init, name="classes")(nn.relu(x))


class MaskRCNN(nn.Module):
    """Finds objects: boxes, classes and, if asked, masks.

    Attributes:
      pyramid: the backbone.
      classes: the background, 0, among them.
      with_masks: whether there is a mask head.
      anchor_sizes: one for each level of the pyramid, in pixels.
      anchor_ratios: heights over widths.
      canonical_side: see `level_of`.
      hidden: units of the box head's layers.
      mask_convs: layers of the mask head.
      box_size: of the grid that the box head sees.
      mask_size: of the grid that the mask head sees; its masks have twice the size.
      region_samples: anchors of an image that are learned from.
      box_samples: proposals of an image that are learned from, a quarter of them objects at most.
      before: proposals of a level before suppression, in training and in evaluation.
      after: proposals of an image.
      candidates: pairs of proposal and class that detections are chosen from.
      detections: of an image at most.
    """

    pyramid: FeaturePyramid
    classes: int = 91
    with_masks: bool = False
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    canonical_side: float = 224
    hidden: int = 1024
    mask_convs: int = 4
    box_size: int = 7
    mask_size: int = 14
    region_samples: int = 256
    box_samples: int = 512
    before: tuple[int, int] = (2000, 1000)
    after: tuple[int, int] = (2000, 1000)
    candidates: int = 1000
    detections: int = 100

    def setup(self) -> None:
        """Makes the heads."""
        self.regions = RegionHead(len(self.anchor_ratios))
        self.boxes = BoxHead(self.classes, self.hidden)
        if self.with_masks:
            self.masks = MaskHead(self.classes, self.mask_convs)

    def losses(
        self, images: jax.Array, truth: Objects, key: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        """Returns the four or five losses of each image, (batch,) each.

        Of the sampled anchors: cross entropy of "objectness", and smooth L1 of the objects'
        "region codes" over the number of samples. Of the sampled proposals, the true boxes among
        them: the same for "classes" and "box codes", and binary cross entropy of the objects'
        "masks", at the true class.

        Args:
          images: (batch, height, width, 3).
          truth: of the images.
          key: draws the samples.
          train: whether the batch's own statistics normalize.

        Raises:
          ValueError: the model needs masks that are missing, or that do not fit the images.
        """
        maps, logits, codes = self._look(images, train)
        anchors = self._anchors(maps, images)
        joined = jnp.concatenate(logits, axis=1), jnp.concatenate(codes, axis=1)
        # A row of keys for the anchors, and one for the proposals.
        keys = jax.random.split(key, (2, len(images)))
        region_loss = partial(region_losses, count=self.region_samples)
        objectness, region_codes = jax.vmap(region_loss, (0, 0, 0, None, 0, 0))(
            keys[0], *joined, jnp.concatenate(anchors), truth.boxes, truth.classes
        )
        proposals, there = self._propose(images, anchors, logits, codes, train)
        draw = jax.vmap(partial(choose, count=self.box_samples))
        chosen = draw(keys[1], proposals, there, truth.boxes, truth.classes)
        found_logits, found_codes = self._flat(
            self.boxes, self._crop(maps, chosen.boxes, self.box_size)
        )
        class_loss, code_loss = jax.vmap(box_losses)(chosen, found_logits, found_codes, truth.boxes)
        named = {"objectness": objectness, "region codes": region_codes}
        named |= {"classes": class_loss, "box codes": code_loss}
        if self.with_masks:
            if truth.masks is None:
                raise ValueError("a model with masks needs true masks, got only boxes")
            # Objects come first among the chosen.
            first = jax.tree.map(lambda x: x[:, : self.box_samples // 4], chosen)
            # At most a quarter of the chosen are objects, and only objects have masks to learn.
            drawn = self._flat(self.masks, self._crop(maps, first.boxes, self.mask_size))
            stride = mask_stride(_size(images), truth.masks.shape[2:])
            own_loss = partial(mask_loss, stride=stride)
            named["masks"] = jax.vmap(own_loss)(first, drawn, truth.masks)
        return named

    def find(self, images: jax.Array) -> Found:
        """Returns the detections in images (batch, height, width, 3)."""
        maps, logits, codes = self._look(images, train=False)
        anchors = self._anchors(maps, images)
        proposals, there = self._propose(images, anchors, logits, codes, train=False)
        named, coded = self._flat(self.boxes, self._crop(maps, proposals, self.box_size))
        report = partial(
            detect,
            image=_size(images),
            candidates=self.candidates,
            count=self.detections,
        )
        found = jax.vmap(report)(named, coded, proposals, there)
        if not self.with_masks:
            return Found(found, None)
        drawn = self._flat(self.masks, self._crop(maps, found.boxes, self.mask_size))
        # Padding has class 0 and gets the mask of the background, which nobody learned.
        own = jnp.take_along_axis(drawn, found.classes[..., None, None, None], axis=-1)
        return Found(found, nn.sigmoid(own[..., 0]))

    def _look(
        self, images: jax.Array, train: bool
    ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        """Maps of every level, and what the region head says about them."""
        maps = self.pyramid(images, train)
        # One head for all levels, as in section 4.1 of "Feature Pyramid Networks".
        said = [self.regions(level) for level in maps]
        return maps, [logits for logits, _ in said], [codes for _, codes in said]

    def _anchors(self, maps: list[jax.Array], images: jax.Array) -> list[jax.Array]:
        shapes = [(level.shape[1], level.shape[2]) for level in maps]
        found = pyramid_anchors(shapes, _size(images), self.anchor_sizes, self.anchor_ratios)
        return [jnp.asarray(level) for level in found]

    def _propose(
        self,
        images: jax.Array,
        anchors: list[jax.Array],
        logits: list[jax.Array],
        codes: list[jax.Array],
        train: bool,
    ) -> tuple[jax.Array, jax.Array]:
        index = 0 if train else 1
        one = partial(
            propose,
            anchors=anchors,
            image=_size(images),
            before=self.before[index],
            after=self.after[index],
        )
        return jax.vmap(lambda scores, coded: one(scores, coded))(logits, codes)

    def _crop(self, maps: list[jax.Array], boxes: jax.Array, size: int) -> jax.Array:
        """What the pyramid holds inside of boxes, (batch, n, size, size, features)."""
        # The level of half the resolution is for proposals only.
        levels = maps[:-1]
        which = level_of(boxes, len(levels), canonical_side=self.canonical_side)
        align = partial(roi_align, strides=self.pyramid.strides[: len(levels)], size=size)
        return jax.vmap(lambda m, b, w: align(m, boxes=b, which=w))(levels, boxes, which)

    def _flat(self, head: Callable[[jax.Array], Any], regions: jax.Array) -> Any:
        """Applies a head to the regions of all images at once."""
        batch, count = regions.shape[:2]
        answers = head(regions.reshape(batch * count, *regions.shape[2:]))
        return jax.tree.map(lambda x: x.reshape(batch, count, *x.shape[1:]), answers)


def mask_stride(image: tuple[int, ...], mask: tuple[int, ...]) -> int:
    """Returns how many pixels of an image lie between two of a mask.

    Args:
      image: (height, width).
      mask: the same of the mask.

    Raises:
      ValueError: it is not the same whole number along both axes.
    """
    stride = max(image[0] // mask[0], 1)
    if (stride * mask[0], stride * mask[1]) != tuple(image):
        raise ValueError(
            f"masks of {tuple(mask)} pixels do not fit images of {tuple(image)}: both sides must "
            "be smaller by the same whole factor"
        )
    return stride


def _size(images: jax.Array) -> tuple[int, int]:
    """Height and width."""
    return images.shape[1], images.shape[2]
