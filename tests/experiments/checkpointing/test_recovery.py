"""Fine-tuning after pruning: weights from a file, fixed masks, a dense network to learn from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.training.flags
import nmjax
from experiments.checkpointing.recovery import distilled, read_variables, starting_from
from experiments.train import main
from experiments.training.flags import Flags, make_job
from experiments.training.run import Run
from nmjax.files.tensor_files import write_tensors
from nmjax.post_training import prune_with
from nmjax.trees.leaves import named_leaves
from tests.experiments.tiny import Perceptron, tiny_task

TASK = tiny_task(epochs=2)
RNG = np.random.default_rng(0)
DENSE = jax.tree.map(
    lambda x: np.float32(0.3 * RNG.normal(size=x.shape) if x.ndim > 1 else 1 + RNG.random(x.shape)),
    jax.eval_shape(TASK.init, jax.random.key(0)),
)
BATCH = next(TASK.train_batches(0, 0))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    def make(flags):
        return tiny_task(epochs=flags.epochs or 2)

    monkeypatch.setattr(experiments.training.flags, "find_task", lambda name: make)


def planned():
    return make_job(Flags(method="ste", pattern="2:4")).plan


def pruned():
    """By data, so that the masks are not those of the magnitudes."""

    def forward(params, x):
        collections = {"batch_stats": DENSE["batch_stats"]}
        return Perceptron().apply({"params": params, **collections}, x, train=False)

    scales = np.float32([0.1, 1, 3, 10]).reshape(1, 2, 2, 1)
    params = prune_with(
        forward, DENSE["params"], planned(), [BATCH["image"] * scales], "wanda", sequential=False
    )
    return {**DENSE, "params": jax.tree.map(np.asarray, params)}


PRUNED_FILE = "pruned.safetensors"


@pytest.fixture
def files(tmp_path):
    variables = pruned()
    packed = {**variables, "params": nmjax.pack(variables["params"], planned())}
    nmjax.save_packed(tmp_path / PRUNED_FILE, packed)
    write_tensors(tmp_path / "flat.safetensors", named_leaves(variables), {})
    write_tensors(tmp_path / "dense.safetensors", named_leaves(DENSE), {})
    return tmp_path, variables


def test_variables_are_read_from_packed_and_dense_files(files):
    folder, variables = files
    for name in (PRUNED_FILE, "flat.safetensors"):
        task = starting_from(TASK, folder / name)
        for seed in (0, 1):
            found = task.init(jax.random.key(seed))
            jax.tree.map(np.testing.assert_array_equal, found, variables)
    small = tiny_task(width=8)
    with pytest.raises(ValueError, match="does not hold the variables of digits's network"):
        read_variables(small, folder / PRUNED_FILE)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_variables(TASK, folder / "none")


def flags(folder, method, **given):
    given = {"epochs": 2, "log_every": 0, "runs_dir": folder / "runs", "name": method, **given}
    return Flags(method=method, pattern="2:4", from_pruned=folder / PRUNED_FILE, **given)


def test_fixed_masks_stay_and_others_may_change(files):
    folder, variables = files
    plan = planned()
    zeros = {n: x != 0 for n, x in named_leaves(variables["params"]).items() if n in plan}
    run = Run(flags(folder, "one_shot"))
    assert run.finish() == 0
    trained = named_leaves(run.programs.forward(run.state.train))
    for name, kept in zeros.items():
        np.testing.assert_array_equal(np.asarray(trained[name]) != 0, kept)
        assert (np.asarray(trained[name]) != named_leaves(variables["params"])[name]).any()
    # The folder of a checkpoint is a file like the others.
    newest = max((folder / "runs" / "one_shot" / "checkpoints").iterdir(), key=lambda p: p.name)
    again = read_variables(TASK, newest)
    assert named_leaves(again).keys() == named_leaves(variables).keys()
    free = Run(flags(folder, "sr_ste"))
    assert free.finish() == 0
    nmjax.check_sparse(free.programs.forward(free.state.train), plan)


def test_what_is_not_pruned_is_refused(files, capsys):
    folder, _ = files
    options = ["--method", "one_shot", "--pattern", "1:4", "--runs-dir", str(folder / "runs")]
    assert main([*options, "--from-pruned", str(folder / PRUNED_FILE)]) == 1
    assert "middle/kernel" in capsys.readouterr().err


def test_distillation_is_the_formula(files):
    folder, variables = files
    weight, temperature = 0.25, 3.0
    task = distilled(TASK, folder / "dense.safetensors", weight, temperature)
    params, collections = variables["params"], {"batch_stats": variables["batch_stats"]}
    key = jax.random.key(0)
    (loss, updated), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        params, collections, BATCH, key
    )
    own, expected = jax.jit(TASK.loss)(params, collections, BATCH, key)
    jax.tree.map(np.testing.assert_array_equal, updated, expected)
    student, _ = Perceptron().apply(variables, BATCH["image"], train=True, mutable=["batch_stats"])
    teacher = Perceptron().apply(DENSE, BATCH["image"], train=False)

    def softmax(x):
        e = np.exp(np.float64(x) / temperature - np.max(np.float64(x) / temperature, -1)[:, None])
        return e / e.sum(-1, keepdims=True)

    t, z = softmax(teacher), softmax(student)
    divergence = (t * (np.log(t) - np.log(z))).sum(-1).mean()
    assert divergence > 1e-3
    np.testing.assert_allclose(
        loss, (1 - weight) * own + weight * temperature**2 * divergence, rtol=1e-4
    )
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    # The dense network has nothing to learn from itself in evaluation.
    logits = task.logits(DENSE["params"], {"batch_stats": DENSE["batch_stats"]}, BATCH, None)
    np.testing.assert_allclose(logits, teacher, rtol=1e-5)


def test_a_run_that_learns_from_the_dense_network(files):
    folder, _ = files
    run = Run(flags(folder, "one_shot", distill=folder / "dense.safetensors", remat=True))
    assert run.finish() == 0


def test_numbers_and_tasks_that_cannot_be_distilled(files):
    path = files[0] / "dense.safetensors"
    with pytest.raises(ValueError, match="distill_weight lies between 0 and 1, got 2"):
        distilled(TASK, path, 2, 1)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        distilled(TASK, path, 0.5, 0)
    with pytest.raises(ValueError, match="has no logits to compare: train without --distill"):
        distilled(dataclasses.replace(TASK, logits=None), path, 0.5, 1)
