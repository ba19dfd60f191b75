"""Faster and Mask R-CNN: parameters as published, shapes, losses and detections of a tiny one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.detection.boxes import encode
from experiments.models.detection.feature_pyramid import FeaturePyramid
from experiments.models.detection.losses import Chosen, box_losses, choose, mask_loss, region_losses
from experiments.models.detection.mask_rcnn import MaskRCNN, Objects, mask_stride
from experiments.models.detection.proposals import BOX_WEIGHTS, REGION_WEIGHTS, detect, propose
from experiments.models.images.resnet import BasicBlock
from nmjax.linen import make_plan

# What torchvision lists for fasterrcnn_resnet50_fpn and maskrcnn_resnet50_fpn. Both freeze the
# normalization of the backbone, so that its 53,120 scales and biases are not counted.
TORCHVISION = {False: 41_755_286, True: 44_401_393}
NORMALIZATION = 53_120

TINY = MaskRCNN(
    pyramid=FeaturePyramid((1, 1), BasicBlock, width=4, channels=8),
    classes=3,
    with_masks=True,
    anchor_sizes=(8, 16, 24),
    canonical_side=32,
    hidden=8,
    mask_convs=1,
    box_size=3,
    mask_size=3,
    region_samples=16,
    box_samples=8,
    before=(12, 12),
    after=(10, 6),
    candidates=10,
    detections=5,
)


def shapes(model, side=64):
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda k, x: model.init(k, x, method="find"), jax.random.key(0), image)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("with_masks", [False, True])
def test_parameters_are_the_published_models(with_masks):
    model = MaskRCNN(pyramid=FeaturePyramid(), with_masks=with_masks)
    assert count(shapes(model)["params"]) == TORCHVISION[with_masks] + NORMALIZATION
    plan = make_plan(model, "2:4", (1, 64, 64, 3), call={"method": "find"}, exclude=("/stem/",))
    dense = {name for name in plan.dense if name.endswith("kernel")}
    assert dense == {"pyramid/stem/kernel"}


def test_the_pyramids_maps_halve():
    pyramid = FeaturePyramid((1, 1), BasicBlock, width=4, channels=8)
    assert pyramid.strides == (4, 8, 16)
    image = jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.float32)
    maps = jax.eval_shape(
        lambda k, x: pyramid.init_with_output(k, x, False)[0], jax.random.key(0), image
    )
    assert [level.shape for level in maps] == [(2, 8, 12, 8), (2, 4, 6, 8), (2, 2, 3, 8)]
    with pytest.raises(ValueError, match="multiples of 16"):
        shapes(TINY, side=40)


def test_proposals_are_the_best_of_what_suppression_leaves():
    anchors = np.array([[0, 0, 8, 8], [0, 1, 8, 9], [20, 20, 28, 28], [4, 20, 12, 28]], np.float32)
    scores = np.array([1.0, 3.0, 2.0, -1.0], np.float32)
    codes = np.zeros((4, 4), np.float32)
    run = jax.jit(lambda s, c: propose([s], [c], [anchors], (24, 40), before=3, after=3))
    boxes, there = run(scores, codes)
    # The first is suppressed by the second, the last is not among the best three.
    assert there.tolist() == [True, True, False]
    np.testing.assert_allclose(boxes[:2], [[0, 1, 8, 9], [20, 20, 28, 24]], atol=1e-4)


def test_proposals_of_all_levels_compete():
    anchors = [np.array([[0, 0, 4, 4], [8, 8, 12, 12]], "f4"), np.array([[16, 16, 24, 24]], "f4")]
    scores = [np.array([0.0, 2.0], "f4"), np.array([1.0], "f4")]
    codes = [np.zeros((2, 4), "f4"), np.zeros((1, 4), "f4")]
    run = jax.jit(lambda s, c: propose(s, c, anchors, (32, 32), before=9, after=2))
    boxes, there = run(scores, codes)
    assert there.all()
    assert boxes.tolist() == [[8, 8, 12, 12], [16, 16, 24, 24]]


def test_detections_of_two_classes_do_not_suppress_each_other():
    proposals = jnp.array([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 10]])
    there = jnp.array([True, True, True, False])
    # Background, class 1, class 2.
    logits = jnp.log(
        jnp.array([[0.1, 0.5, 0.4], [0.3, 0.6, 0.1], [0.97, 0.02, 0.01], [0.0, 1.0, 0.0]]) + 1e-9
    )
    codes = jnp.zeros((4, 3, 4))
    run = jax.jit(lambda *a: detect(*a, (40, 40), candidates=8, count=4))
    found = run(logits, codes, proposals, there)
    # Class 1: the second proposal, which suppresses the first. Class 2: the first, and not the
    # second, which overlaps it. Below 0.05 nothing is reported, and padding never.
    assert found.classes.tolist() == [1, 2, 0, 0]
    np.testing.assert_allclose(found.scores, [0.6, 0.4, 0, 0], rtol=1e-3)
    np.testing.assert_allclose(found.boxes[:2], [[0, 0, 10, 9], [0, 0, 10, 10]], atol=1e-4)


def test_detections_are_decoded_with_their_own_class():
    proposal, target = jnp.array([[0.0, 0, 10, 10]]), jnp.array([[2.0, 3, 9, 14]])
    codes = jnp.zeros((1, 3, 4)).at[0, 2].set(encode(target, proposal, BOX_WEIGHTS)[0])
    logits = jnp.array([[0.0, 0.0, 9.0]])
    run = jax.jit(lambda *a: detect(*a, (40, 40), candidates=2, count=1))
    found = run(logits, codes, proposal, jnp.array([True]))
    np.testing.assert_allclose(found.boxes[0], target[0], rtol=1e-4)


def test_region_losses_counted_by_hand():
    anchors = jnp.array([[0.0, 0, 8, 8], [20, 20, 28, 28], [0, 20, 8, 28]])
    boxes = jnp.array([[0.0, 0, 8, 9], [0, 0, 0, 0]])
    classes = jnp.array([1, 0])
    logits = jnp.array([2.0, -1.0, 0.5])
    codes = jnp.zeros((3, 4)).at[1].set(100.0)
    run = jax.jit(lambda *a: region_losses(jax.random.key(0), *a, count=8))
    objectness, code = run(logits, codes, anchors, boxes, classes)
    entropy = [np.log1p(np.exp(-2)), np.log1p(np.exp(-1)), np.log1p(np.exp(0.5))]
    assert float(objectness) == pytest.approx(np.mean(entropy), rel=1e-4)
    # Codes (0, 1/16, 0, log 9/8): the first below beta = 1/9, the second above.
    y, h = 1 / 16, np.log(9 / 8)
    expected = (0.5 * y**2 * 9 + (h - 1 / 18)) / 3
    assert float(code) == pytest.approx(expected, rel=1e-3)


def test_losses_of_images_without_objects_are_finite_and_so_are_their_gradients():
    anchors = jnp.array([[0.0, 0, 8, 8], [0, 0, 0, 0]])
    nothing = jnp.zeros((2, 4))
    classes = jnp.zeros(2, int)

    def total(codes):
        key = jax.random.key(0)
        region = region_losses(key, codes[:, 0], codes, anchors, nothing, classes, count=4)
        chosen = choose(key, anchors, jnp.array([True, False]), nothing, classes, count=4)
        by_class = jnp.zeros((4, 3, 4)) + codes.sum()
        box = box_losses(chosen, by_class[..., 0], by_class, nothing)
        mask = mask_loss(chosen, jnp.zeros((4, 2, 2, 3)) + codes.sum(), jnp.zeros((2, 8, 8)))
        return sum(region) + sum(box) + mask

    value, grads = jax.jit(jax.value_and_grad(total))(jnp.ones((2, 4)))
    assert np.isfinite(value)
    assert np.isfinite(grads).all()


def test_chosen_proposals_are_objects_first_and_padding_weighs_nothing():
    boxes = jnp.array([[0.0, 0, 10, 10], [0, 0, 0, 0]])
    classes = jnp.array([2, 0])
    proposals = jnp.array([[30.0, 30, 40, 40], [0, 0, 10, 8], [0, 0, 9, 9]])
    there = jnp.array([True, True, False])
    chosen = jax.jit(lambda *a: choose(jax.random.key(0), *a, count=4))(
        proposals, there, boxes, classes
    )
    # One of four may be an object; two are: the true box itself and the second proposal.
    assert chosen.classes.tolist() == [2, 0, 0, 0]
    assert chosen.weights.tolist() == [1, 1, 0, 0]
    assert chosen.boxes[1].tolist() == [30, 30, 40, 40]


def test_mask_loss_is_the_entropy_inside_of_the_box():
    mask = np.zeros((2, 16, 16), np.uint8)
    mask[1, 4:8, 4:12] = 1
    # Upper half of the box is object, lower half is not.
    chosen = Chosen(
        boxes=jnp.array([[4.0, 0, 12, 16], [4, 4, 12, 12]]),
        object=jnp.array([0, 1]),
        classes=jnp.array([0, 2]),
        weights=jnp.ones(2),
    )
    logits = jnp.zeros((2, 2, 2, 3)).at[1, ..., 2].set(jnp.array([[3.0, 3], [-3, -3]]))
    logits = logits.at[1, ..., 1].set(50.0)
    found = float(jax.jit(mask_loss)(chosen, logits, mask))
    assert found == pytest.approx(np.log1p(np.exp(-3)), rel=0.05)


def test_targets_of_coarse_masks_are_those_of_fine_ones():
    fine = np.zeros((2, 64, 64), np.uint8)
    fine[1, 8:40, 16:48] = 1
    coarse = fine[:, 2::4, 2::4]
    # Every sample of these boxes is as far from an edge as the middle of a coarse pixel, or more.
    chosen = Chosen(
        boxes=jnp.array([[8.0, 0, 56, 48], [16, 8, 48, 40], [0, 0, 64, 64]]),
        object=jnp.array([1, 1, 0]),
        classes=jnp.array([1, 2, 1]),
        weights=jnp.ones(3),
    )
    # The loss is linear in the targets, so that these gradients tell all of them.
    grad = jax.jit(jax.grad(mask_loss, argnums=1), static_argnames="stride")
    logits = jnp.zeros((3, 2, 2, 3))
    expected = grad(chosen, logits, jnp.asarray(fine))
    np.testing.assert_allclose(
        grad(chosen, logits, jnp.asarray(coarse), stride=4), expected, atol=1e-7
    )
    # A quarter of each cell of the first box is object, or all of the second.
    assert np.ptp(np.asarray(expected)[0, ..., 1]) == 0
    assert (expected[1, ..., 2] < 0).all()
    assert (expected[2, ..., 1] > 0).all()


def test_masks_are_coarser_by_a_whole_factor():
    assert mask_stride((64, 96), (64, 96)) == 1
    assert mask_stride((64, 96), (16, 24)) == 4
    for mask in ((16, 96), (15, 24), (128, 192)):
        with pytest.raises(ValueError, match="the same whole factor"):
            mask_stride((64, 96), mask)


@pytest.mark.slow
def test_a_tiny_network_learns_one_scene():
    rng = np.random.default_rng(0)
    image = rng.uniform(-0.2, 0.2, (1, 32, 32, 3)).astype(np.float32)
    image[0, 6:20, 8:22] = 1
    masks = np.zeros((1, 2, 32, 32), np.uint8)
    masks[0, 0, 6:20, 8:22] = 1
    truth = Objects(
        np.array([[[8, 6, 22, 20], [0, 0, 0, 0]]], np.float32), np.array([[2, 0]]), masks
    )
    variables = jax.jit(lambda key: TINY.init(key, image, method="find"))(jax.random.key(0))
    stats = variables["batch_stats"]

    def loss(params, key):
        found = TINY.apply(
            {"params": params, "batch_stats": stats}, image, truth, key, False, method="losses"
        )
        return sum(found.values()).sum()

    step = jax.jit(jax.value_and_grad(loss))
    params, first = variables["params"], None
    for index in range(80):
        value, grads = step(params, jax.random.key(index))
        first = value if first is None else first
        params = jax.tree.map(lambda p, g: p - 0.1 * jnp.clip(g, -0.1, 0.1), params, grads)
    assert float(value) < 0.5 * float(first)


def test_region_weights_are_plain():
    box, anchor = jnp.array([1.0, 1, 5, 5]), jnp.array([0.0, 0, 4, 4])
    np.testing.assert_allclose(encode(box, anchor, REGION_WEIGHTS), [0.25, 0.25, 0, 0])
