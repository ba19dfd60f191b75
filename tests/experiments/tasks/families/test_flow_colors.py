"""The color wheel: known directions, lengths, opposite sides."""

import numpy as np
import pytest

from experiments.tasks.families.flow_colors import color_wheel, flow_to_colors


def test_the_wheel_has_the_published_segments():
    wheel = np.rint(255 * color_wheel()).astype(int)
    assert wheel.shape == (55, 3)
    corners = np.cumsum([0, 15, 6, 4, 11, 13])
    expected = [(255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255)]
    assert wheel[corners].tolist() == [list(color) for color in expected]


def test_no_flow_is_white_and_right_is_red():
    shown = flow_to_colors(np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0]]), longest=2)
    assert shown.tolist() == [[255, 255, 255], [255, 0, 0], [255, 127, 127]]


def test_what_is_too_long_is_dimmed():
    shown = flow_to_colors(np.array([[3.0, 0.0]]), longest=2)
    assert shown.tolist() == [[191, 0, 0]]


def test_directions_go_round_the_wheel():
    angles = np.linspace(0, 2 * np.pi, 55, endpoint=False)
    flow = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    shown = flow_to_colors((1 - 1e-9) * flow, longest=1).astype(int)
    assert np.abs(shown - 255 * color_wheel()).max() <= 1


def test_down_is_yellowish_and_up_is_blueish():
    down, up = flow_to_colors(np.array([[0.0, 1.0], [0.0, -1.0]]), longest=1.0).astype(int)
    assert down[0] > 200
    assert down[2] == 0
    assert up[2] > 200


def test_the_longest_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        flow_to_colors(np.zeros((2, 2, 2)), longest=0)
