"""COCO's annotation files: polygons, run lengths, what is damaged; masks sampled coarsely."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as run_lengths

from experiments.data.coco_masks import STRIDE, Outline, open_masks, sample_masks
from experiments.data.records import MissingDatasetError

HEIGHT, WIDTH = 20, 40
# Columns 10 to 29 of rows 4 to 11.
RECTANGLE = [[10, 4, 30, 4, 30, 12, 10, 12]]


def annotation(number, segmentation, *, image=7, crowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "segmentation": segmentation,
        "iscrowd": crowd,
    }


def write(folder, annotations, *, split="train", images=(7,)):
    """Writes a file of annotations, all of images of 20 x 40 pixels, where it is looked for."""
    file = folder / "coco" / "annotations" / f"instances_{split}2017.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": number, "height": HEIGHT, "width": WIDTH} for number in images],
        "annotations": annotations,
        "categories": [{"id": 1}],
    }
    file.write_text(json.dumps(content))
    return file


def rectangle(left, top, right, bottom):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[top:bottom, left:right] = 1
    return pixels


def in_a_list(pixels):
    """COCO's run lengths of crowds, counted one by one: zeros first, column after column."""
    counts, value = [0], 0
    for pixel in pixels.T.reshape(-1):
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(pixels.shape), "counts": [int(count) for count in counts]}


def outline(pixels):
    counts = run_lengths.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"]
    return Outline(7, pixels.shape, counts)


def test_polygons_and_run_lengths_are_what_they_draw(tmp_path, capsys):
    noise = (np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5).astype(np.uint8)
    parts = [*RECTANGLE, [0, 0, 4, 0, 4, 3, 0, 3]]
    crossing = [[30, 10, 60, 10, 60, 30, 30, 30]]
    write(
        tmp_path,
        [
            annotation(1, RECTANGLE),
            annotation(2, parts),
            annotation(3, in_a_list(noise)),
            annotation(4, in_a_list(1 - noise), crowd=1),
            annotation(5, crossing),
        ],
    )
    found = open_masks("train", tmp_path).find(7, [1, 2, 3, 4, 5], "a picture")
    whole = rectangle(10, 4, 30, 12)
    expected = [whole, whole | rectangle(0, 0, 4, 3), noise, 1 - noise, rectangle(30, 10, 40, 20)]
    for one, pixels in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.decode(), pixels)
        assert not one.is_empty()
    assert capsys.readouterr().out == ""


def test_what_shows_no_pixel_is_an_empty_mask(tmp_path):
    outside = [[50, 4, 60, 4, 60, 12, 50, 12]]
    nothing = in_a_list(np.zeros((HEIGHT, WIDTH)))
    write(tmp_path, [annotation(1, []), annotation(2, outside), annotation(3, nothing)])
    for one in open_masks("train", tmp_path).find(7, [1, 2, 3], "a picture"):
        assert one.is_empty()
        assert not one.decode().any()


@pytest.mark.parametrize(
    "segmentation",
    [
        7,
        [[1, 2, 3]],
        [["a"] * 6],
        {"size": [HEIGHT, WIDTH]},
        {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
        {"size": [HEIGHT, WIDTH], "counts": [3, 9000]},
        {"size": [HEIGHT, WIDTH], "counts": [-3, HEIGHT * WIDTH + 3]},
    ],
)
def test_damaged_segmentations_are_named(tmp_path, segmentation):
    write(tmp_path, [annotation(1, RECTANGLE), annotation(22, segmentation)])
    with pytest.raises(ValueError, match=r"instances_train2017\.json: annotation 22 has no"):
        open_masks("train", tmp_path)


def test_damaged_files_are_named(tmp_path):
    file = write(tmp_path, [annotation(1, RECTANGLE, image=8)])
    with pytest.raises(ValueError, match=r"annotation 1 has no readable .* KeyError: 8"):
        open_masks("train", tmp_path)
    for text in ('{"images": [', "[1, 2]", '{"annotations": [{}]}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"instances_train2017\.json is not an annot"):
            open_masks("train", tmp_path)


def test_a_missing_file_says_what_to_get(tmp_path):
    with pytest.raises(MissingDatasetError, match=r"annotations_trainval2017\.zip") as error:
        open_masks("validation", tmp_path)
    assert str(tmp_path / "coco" / "annotations" / "instances_val2017.json") in str(error.value)


def test_objects_of_other_images_are_not_found(tmp_path):
    write(tmp_path, [annotation(1, RECTANGLE)], images=(7, 8))
    masks = open_masks("train", tmp_path)
    assert masks.find(7, [], "a picture") == []
    for image, number in ((8, 1), (7, 2)):
        with pytest.raises(ValueError, match=f"a picture: .* no annotation {number} of image"):
            masks.find(image, [number], "a picture")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_masks_are_those_of_the_enlarged_image(height, width, scale, mirrored, seed):
    pixels = np.random.default_rng(seed).integers(0, 2, (2, height, width))
    large = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    padded = np.zeros((2, 80, 80), int)
    padded[:, : height * scale, : width * scale] = large[..., ::-1] if mirrored else large
    # The middle of four pixels lies between the second and the third; the third is taken, which
    # is the second from the other end.
    expected = padded[:, 2::STRIDE, (1 if mirrored else 2) :: STRIDE]
    expected[:, :, (np.arange(20) + 0.5) * STRIDE >= width * scale] = 0
    found = sample_masks(
        [outline(one) for one in pixels], (height * scale, width * scale), 20, mirrored=mirrored
    )
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
