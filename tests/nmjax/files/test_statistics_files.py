"""Statistics of activations in files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.__main__ import main
from nmjax.files.statistics_files import load_statistics, save_statistics
from nmjax.files.tensor_files import read_tensors, write_tensors
from nmjax.post_training import Statistics, collect, wanda

RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"weight": jnp.asarray(RNG.normal(size=(8, 16)), jnp.float32)},
    "stack": jnp.asarray(RNG.normal(size=(3, 8, 8)), jnp.float32),
}
BATCHES = [jnp.asarray(RNG.normal(size=(5, 16)), jnp.float32) for _ in range(3)]


def forward(params, x):
    x = x @ params["first"]["weight"].T
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]


PLAN = nmjax.make_plan(PARAMS, "2:4", forward=forward, inputs=(BATCHES[0],))


@pytest.mark.parametrize("kind", ["mean_square", "gram"])
@pytest.mark.filterwarnings("ignore:too little calibration data")
def test_more_data_is_added_to_what_a_file_holds(tmp_path, kind):
    save_statistics(tmp_path / "s", collect(forward, PARAMS, BATCHES[:1], PLAN, kind))
    start = load_statistics(tmp_path / "s")
    continued = collect(forward, PARAMS, BATCHES[1:], PLAN, kind, start=start)
    at_once = collect(forward, PARAMS, BATCHES, PLAN, kind)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), continued, at_once)


def test_the_command_line_prunes_with_a_saved_file(tmp_path):
    """With PyTorch's names in the checkpoint, and the tree's own in the statistics."""
    statistics = collect(forward, PARAMS, BATCHES, PLAN)
    save_statistics(tmp_path / "s", statistics)
    tensors = {"first.weight": PARAMS["first"]["weight"], "stack": PARAMS["stack"]}
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    main(
        [
            *("prune", str(tmp_path / "x.safetensors"), "--pattern", "2:4", "--method", "wanda"),
            *("--statistics", str(tmp_path / "s"), "--out", str(tmp_path / "out.safetensors")),
            *("--axes", "weight=-1", "--exclude", "stack"),
        ]
    )
    pruned, _ = read_tensors(tmp_path / "out.safetensors")
    expected = wanda(PARAMS, PLAN, statistics)
    np.testing.assert_array_equal(pruned["first.weight"], expected["first"]["weight"])
    np.testing.assert_array_equal(pruned["stack"], PARAMS["stack"])


@pytest.mark.parametrize(
    ("tensors", "note", "message"),
    [
        ({"w": np.ones(4, np.float32)}, "", "does not hold statistics"),
        ({"w": np.ones(4, np.float32)}, '{"format": "statistics"}', "does not say how many rows"),
        (
            {"w": np.ones((2, 4, 3), np.float32)},
            '{"format": "statistics", "rows": {"w": [1, 1]}}',
            r"w float32\(2, 4, 3\) over rows \(2,\) is not a statistic",
        ),
        (
            {"w": np.ones((2, 4), np.int32)},
            '{"format": "statistics", "rows": {"w": [1, 1]}}',
            "w int32.* is not a statistic",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, note, message):
    write_tensors(tmp_path / "s", tensors, {"nmjax": note} if note else {})
    with pytest.raises(ValueError, match=message):
        load_statistics(tmp_path / "s")


def test_wrong_calls():
    with pytest.raises(TypeError, match=r"save_statistics\(path, statistics\)"):
        save_statistics("s", PARAMS)
    with pytest.raises(TypeError, match="the path must be"):
        save_statistics(Statistics({}, {}), "s")
