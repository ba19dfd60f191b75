"""The detection tasks: batches, a few steps of training, scores, pictures, COCO's own layout."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.models.detection.mask_rcnn import Found
from experiments.models.detection.proposals import Detections
from experiments.tasks import detection as module
from experiments.tasks.detection import draw_batch
from experiments.tasks.families.coco_metrics import Annotated
from experiments.tasks.families.object_detection import (
    Seen,
    annotated,
    detection_scores,
    draw_objects,
    true_objects,
)
from experiments.training.flags import Flags, make_job, make_task
from experiments.training.loop import train
from tests.experiments.models.detection.test_mask_rcnn import TINY


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TEST_SCENES", 8)
        patch.setattr(module, "STEPS_PER_EPOCH", 2)
        patch.setattr(module, "_EVAL_BATCH", 4)
        patch.setattr(module, "tiny_mask_rcnn", lambda: replace(TINY, classes=11))
        module.test_batches.cache_clear()
        yield
    module.test_batches.cache_clear()


def perfect(batch, score=0.9):
    """What a network that knows the truth would say."""
    there = batch["classes"] > 0
    masks = np.zeros((*there.shape, 28, 28), np.float32)
    for at in zip(*np.nonzero(there), strict=True):
        left, top, right, bottom = batch["boxes"][at].astype(int)
        inside = batch["masks"][at][top:bottom, left:right]
        rows = np.arange(28) * inside.shape[0] // 28
        columns = np.arange(28) * inside.shape[1] // 28
        masks[at] = inside[rows][:, columns]
    scores = np.where(there, score, 0)
    return Found(Detections(batch["boxes"], batch["classes"], scores), masks)


def seen(batch, found):
    """The same with the true masks, as the task predicts it."""
    return Seen(found, np.packbits(batch["masks"], axis=-1))


def test_batches_depend_on_seed_and_epoch_only():
    task = module.task()

    def first(seed, epoch):
        return next(iter(task.train_batches(seed, epoch)))["image"]

    np.testing.assert_array_equal(first(1, 2), first(1, 2))
    for other in ((1, 3), (2, 2)):
        assert not np.array_equal(first(1, 2), first(*other))


def test_the_data_are_described():
    (note,) = module.task().notes
    batches = module.test_batches()
    digits = sum(int((batch["classes"] > 0).sum()) for batch in batches)
    assert f"8 test scenes with {digits} digits" in note


def test_a_network_that_knows_the_truth_is_perfect():
    batches = module.test_batches()
    scores = detection_scores((64, 64), batches, [seen(batch, perfect(batch)) for batch in batches])
    assert scores["box AP"] == pytest.approx(1)
    assert scores["mask AP50"] == pytest.approx(1)
    # Masks of 28 x 28 lose something.
    assert 0.6 < scores["mask AP"] <= 1


def test_padded_images_do_not_count():
    batches = module.test_batches()
    batch = {**batches[0], "valid": np.array([1, 1, 1, 0])}
    found = perfect(batch)
    wrong = found.detections._replace(boxes=found.detections.boxes.copy())
    wrong.boxes[3] += 40
    scores = detection_scores((64, 64), [batch], [seen(batch, Found(wrong, found.masks))])
    assert scores["box AP"] == pytest.approx(1)


def test_coarse_masks_are_compared_at_their_own_resolution():
    # 40 x 40 pixels of 64 x 48 are 10 x 10 of 16 x 12; a found one of 24 rows has 6 of these.
    boxes = np.array([[[4, 8, 44, 48]]], np.float32)
    masks = np.zeros((1, 1, 16, 12), np.uint8)
    masks[0, 0, 2:12, 1:11] = 1
    classes = np.array([[1]], np.int32)
    batch = {"boxes": boxes, "classes": classes, "valid": np.array([1]), "masks": masks}
    drawn = np.ones((1, 1, 20, 20), np.float32)
    for rows, expected in ((20, 1.0), (12, 0.3)):
        drawn[:, :, rows:] = 0
        found = Found(Detections(boxes, classes, np.array([[0.9]])), drawn)
        scores = detection_scores((64, 48), [batch], [seen(batch, found)])
        assert scores["box AP"] == pytest.approx(1)
        assert scores["mask AP"] == pytest.approx(expected, abs=1e-6)


def test_coarse_masks_are_drawn_as_large_as_the_image():
    mask = np.random.default_rng(0).integers(0, 2, (1, 4, 6))
    fine = mask.repeat(4, axis=1).repeat(4, axis=2)
    pixels = np.zeros((16, 24, 3), np.uint8)
    boxes = np.array([[0, 0, 24, 16]])
    coarse, whole = (
        draw_objects(pixels, Annotated((16, 24), boxes, np.array([1]), masks=one), [0])
        for one in (mask, fine)
    )
    np.testing.assert_array_equal(coarse, whole)


def test_padding_of_annotation_and_detections_is_left_out():
    batch = draw_batch(np.random.default_rng(0), 3, "test")
    counts = [int((classes > 0).sum()) for classes in batch["classes"]]
    assert [len(one.classes) for one in true_objects((64, 64), batch)] == counts
    assert [len(one.scores) for one in annotated((64, 64), perfect(batch))] == counts


def test_loss_and_predictions_have_static_shapes():
    task = module.task()
    batch = next(task.eval_batches())

    def run(key):
        variables = task.init(key)
        params = variables.pop("params")
        loss, collections = task.loss(params, variables, batch, key)
        sums = task.evaluate(params, collections, batch)
        return loss, sums, task.predict(params, collections, batch)

    loss, sums, found = jax.eval_shape(run, jax.random.key(0))
    assert loss.shape == ()
    assert set(sums) == {"count", "loss"}
    assert found.found.detections.boxes.shape == (4, 5, 4)
    assert found.found.masks.shape == (4, 5, 6, 6)
    assert found.true_masks.shape == (4, 4, 64, 8)


@pytest.mark.slow
def test_a_few_sparse_steps_can_be_scored_and_shown():
    job = make_job(Flags(task="detection", method="sr_ste", epochs=1, batch_size=2))
    (report,) = train(job, watch_every=2)
    assert report.density[0] == pytest.approx(0.5)
    assert np.isfinite(report.train_loss).all()
    assert {metric.name for metric in job.task.metrics} | {"loss"} <= set(report.test)
    state = jax.device_get(report.state.train)
    rows = job.task.show(state.params, state.collections)
    assert [list(row) for row in rows] == [["truth", "network"]] * 4
    assert all(text.startswith("data:image/jpeg;base64,") for text in rows[0].values())


def test_what_is_drawn_lies_where_the_object_is():
    batch = draw_batch(np.random.default_rng(1), 8, "test")
    index = next(i for i, classes in enumerate(batch["classes"]) if classes[0] > 0)
    true = true_objects((64, 64), batch)[index]
    pixels = np.zeros((64, 64, 3), np.uint8)
    drawn = draw_objects(pixels, true, [0], enlarge=3)
    assert drawn.shape == (192, 192, 3)
    colored = drawn.max(axis=-1) > 0
    left, top, right, bottom = (3 * true.boxes[0]).astype(int)
    assert colored[top, left:right].all()
    assert colored[top:bottom, left].all()
    mask = true.masks[0].repeat(3, axis=0).repeat(3, axis=1) > 0
    assert colored[mask].all()
    assert not draw_objects(pixels, true, []).any()


def test_recipe_follows_the_flags_and_the_model_is_fixed():
    task = make_task(Flags(task="detection", epochs=3, batch_size=2))
    assert (task.recipe.epochs, task.recipe.batch_size) == (3, 2)
    with pytest.raises(ValueError, match="no model named 'resnet50'; choose from mask_rcnn_tiny"):
        make_task(Flags(task="detection", model="resnet50"))


def test_missing_coco_is_a_clear_error(tmp_path, capsys):
    from experiments.train import main

    assert main(["--task", "coco", "--data-dir", str(tmp_path), "--runs-dir", str(tmp_path)]) == 1
    assert "tfds build coco/2017" in capsys.readouterr().err
