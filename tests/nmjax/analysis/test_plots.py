"""Pictures: what is drawn where; that importing the library does not import matplotlib."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

from matplotlib.figure import Figure

from nmjax.analysis.plots import (
    plot_curves,
    plot_kernels,
    plot_layer_sad,
    plot_mask,
    plot_sad,
)


@pytest.fixture
def ax():
    return Figure().subplots()


def test_curves_show_mean_and_one_standard_error(ax):
    runs = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    plot_curves({"a": runs}, [10, 20, 30], ax=ax)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[10, 2], [20, 3], [30, 4]])
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(1)  # 2 - sqrt(2) / sqrt(2)
    assert band[:, 1].max() == pytest.approx(5)


def test_curves_leave_out_what_is_not_known(ax):
    plot_curves({"a": [1.0, np.nan, 3.0]}, ax=ax)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 1], [2, 3]])
    assert not ax.collections


def test_sad_in_percent_and_where_unrelated_masks_lie(ax):
    plot_sad({"STE": [0, 50, 100]}, weights=200, density=0.25, ax=ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0, 25, 50])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 100 * 2 * 0.25 * 0.75)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["STE", "unrelated masks"]


def test_where_unrelated_masks_lie_needs_the_number_of_weights(ax):
    with pytest.raises(ValueError, match="pass weights= too"):
        plot_sad({"STE": [0, 50]}, density=0.25, ax=ax)


def test_sad_in_entries(ax):
    plot_sad({"STE": [0, 50]}, ax=ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0, 50])
    assert ax.get_ylabel() == "SAD, mask entries"


def test_layer_sad_has_a_bar_for_each_layer_and_group(ax):
    groups = {
        "dense": {"a/kernel": 10, "b/kernel": [20, 40]},
        "STE": {"a/kernel": 5, "b/kernel": 8},
    }
    plot_layer_sad(groups, {"a/kernel": 100, "b/kernel": 200}, density=0.5, ax=ax)
    assert [bar.get_width() for bar in ax.patches] == [10, 15, 5, 4]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.yaxis_inverted()


def test_mask_is_drawn_with_inputs_downwards(ax):
    mask = np.array([[True, False, True], [False, True, False], [1, 1, 0], [0, 0, 1]], bool)
    plot_mask(mask, m=2, ax=ax)
    np.testing.assert_array_equal(ax.images[0].get_array(), mask)
    assert [line.get_ydata()[0] for line in ax.lines] == [1.5]


def test_kernels_are_drawn_by_input_and_output_channel():
    mask = np.random.default_rng(0).random((3, 3, 4, 5)) < 0.3
    figure = plot_kernels(mask, inputs=(1, 3), outputs=(0, 2, 4))
    axes = np.array(figure.axes).reshape(2, 3)
    np.testing.assert_array_equal(axes[1, 2].images[0].get_array(), mask[:, :, 3, 4])
    assert axes[0, 1].get_title() == "2"
    assert len(plot_kernels(mask).axes) == 20


def test_kernels_want_a_convolution():
    with pytest.raises(ValueError, match=r"4 axes .* got shape \(3, 4\)"):
        plot_kernels(np.ones((3, 4), bool))


def test_new_axes_where_none_are_given():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    assert plot_curves({"a": [1, 2]}).figure.number not in before
    plt.close("all")


def test_importing_the_library_does_not_import_matplotlib():
    code = "import sys, nmjax, nmjax.analysis.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
