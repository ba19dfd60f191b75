"""States that come back from disk as they went, onto any mesh; and what is done about damage."""

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import nmjax
from experiments.checkpointing import checkpoints
from experiments.checkpointing.checkpoints import Checkpoints
from experiments.distributed import processes
from experiments.distributed.placement import make_placement


class State(NamedTuple):
    params: Any
    opt_state: Any
    masks: Any
    nothing: Any
    step: Any


def make_state(size=16, step=7):
    params = {"layer": {"kernel": jnp.linspace(0, 1, size * 16).reshape(size, 16) + step}}
    tx = optax.chain(optax.identity(), optax.adamw(lambda step: 0.1))
    masks = {"layer/kernel": params["layer"]["kernel"] > 0.5 + step, "taken": jnp.array(True)}
    half = {"half": jnp.ones(3, jnp.bfloat16)}
    return State(params, tx.init(params), masks, ((), half), jnp.int32(step))


LIKE = jax.eval_shape(make_state)
PLAN = nmjax.make_plan(LIKE.params, "2:4")


def assert_identical(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def place(mesh, axis_type=AxisType.Auto):
    if mesh is None:
        return make_placement(LIKE.params, PLAN, batch_size=8)
    return make_placement(
        LIKE.params, PLAN, batch_size=8, mesh=mesh, axis_type=axis_type, preset="tensor"
    )


def save(store, steps, state):
    store.save(steps, state)
    store.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_bit_for_bit(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints")
    assert store.latest() is None
    assert store.restore(LIKE) is None
    store.save(3, make_state())
    store.close()
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.latest() == 3
    steps, restored = again.restore(LIKE)
    assert steps == 3
    assert_identical(restored, make_state())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_state_comes_back_onto_another_mesh(tmp_path, axis_type):
    """From eight devices to four, to one, and back to eight."""
    state = make_state()
    for steps, mesh in enumerate(["data=4,model=2", "model=4", None, "model=8"]):
        placement = place(mesh, axis_type)
        if placement.layout is not None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, placement.like(LIKE))
            state = jax.device_put(state, shardings)
        with placement.active():
            save(Checkpoints(tmp_path, placement=placement), steps, state)
        onto = place({"data=4,model=2": "model=4", "model=4": None}.get(mesh, "model=8"), axis_type)
        with onto.active():
            steps_done, state = Checkpoints(tmp_path, placement=onto).restore(LIKE)
        assert steps_done == steps
        assert_identical(jax.device_get(state), jax.device_get(make_state()))
        kernel = state.params["layer"]["kernel"]
        shards = 1 if onto.layout is None else onto.layout.mesh.shape["model"]
        assert kernel.sharding.shard_shape(kernel.shape) == (16, 16 // shards)
        assert state.masks["layer/kernel"].sharding == kernel.sharding


def test_the_newest_and_the_best_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=2, keep_best=1)
    for steps, score in enumerate([0.1, 0.9, 0.3, 0.2]):
        store.save(steps, {"steps": jnp.int32(steps)}, score=score)
    store.save(4, {"steps": jnp.int32(4)})  # Within an epoch: no score.
    store.wait()
    assert names(tmp_path) == ["1", "3", "4"]
    store.save(5, {"steps": jnp.int32(5)}, score=0.95)
    store.save(6, {"steps": jnp.int32(6)}, score=0.5)
    store.save(7, {"steps": jnp.int32(7)}, score=0.5)
    store.close()
    assert names(tmp_path) == ["5", "6", "7"]
    # What is best is known to a run that goes on.
    store = Checkpoints(tmp_path, keep=1, keep_best=1)
    store.save(8, {"steps": jnp.int32(8)}, score=0.94)
    store.close()
    assert names(tmp_path) == ["5", "8"]


def test_a_saved_state_does_not_change_with_the_memory_it_came_from(tmp_path):
    store = Checkpoints(tmp_path)
    state = {"weights": jnp.arange(1_000_000.0)}
    double = jax.jit(lambda s: jax.tree.map(lambda w: w * 2, s), donate_argnums=0)
    store.save(0, state)
    for _ in range(5):
        state = double(state)
    store.wait()
    _, restored = store.restore({"weights": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)})
    np.testing.assert_array_equal(restored["weights"], np.arange(1_000_000.0))


def test_masks_take_one_bit_a_weight(tmp_path):
    sizes = []
    for dtype in (bool, jnp.uint8):
        noise = jax.random.bernoulli(jax.random.key(0), shape=(512, 512)).astype(dtype)
        # Bytes that zip as little as packed bits do.
        noise = noise if dtype is bool else jax.random.bits(jax.random.key(0), (512, 512), dtype)
        folder = tmp_path / jnp.dtype(dtype).name
        store = Checkpoints(folder)
        store.save(0, {"mask": noise})
        store.close()
        files = (folder / "0" / "state").rglob("*")
        sizes.append(sum(path.stat().st_size for path in files if path.is_file()))
    assert sizes[0] < 512 * 512 / 8 + 8000
    assert sizes[1] > 512 * 512


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            jax.eval_shape(lambda: make_state(size=24)),
            r"leaves masks/layer/kernel is uint8\[16, 2\], not uint8\[24, 2\]",
        ),
        (LIKE._replace(masks={}), "leaves masks/layer/kernel is uint8.*, not None"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, other, message):
    store = Checkpoints(tmp_path)
    store.save(1, make_state())
    store.wait()
    with pytest.raises(ValueError, match=r"the checkpoint .*/1 does not fit this run: ") as error:
        store.restore(other)
    assert re.search(message, str(error.value))
    assert names(tmp_path) == ["1"]


def test_a_state_of_another_plan_is_refused(tmp_path):
    def about(**patterns):
        return {"pattern of": patterns}

    save(Checkpoints(tmp_path, about=about(layer="2:4")), 1, make_state())
    for other, message in [
        (about(layer="1:4"), "pattern of layer is 2:4, not 1:4"),
        (about(), "pattern of layer is 2:4, not None"),
        (about(layer="2:4", head="2:4"), "pattern of head is None, not 2:4"),
        ({"model": "small", **about(layer="2:4")}, "model is None, not small"),
    ]:
        with pytest.raises(ValueError, match=f"does not fit this run: {message}.*--name"):
            Checkpoints(tmp_path, about=other).restore(LIKE)


def test_ctrl_c_waits_until_a_state_is_copied(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    save = store._manager.save

    def save_and_be_interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        save(*args, **kwargs)

    monkeypatch.setattr(store._manager, "save", save_and_be_interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        store.save(1, make_state())
    assert signal.getsignal(signal.SIGINT) is before
    store.wait()
    assert_identical(store.restore(LIKE)[1], make_state())


def saved_twice(folder):
    store = Checkpoints(folder)
    for steps in (1, 2):
        store.save(steps, make_state(step=steps))
    store.close()
    return folder


def files_of_a_checkpoint(folder):
    files = [path for path in sorted((folder / "2").rglob("*")) if path.is_file()]
    return [path.relative_to(folder) for path in files]


slow = pytest.mark.slow
# When one array fails, orbax closes its event loop while tensorstore is at work on others.
closes_its_loop = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@closes_its_loop
@pytest.mark.parametrize(
    "damage", ["cut", pytest.param("flipped", marks=slow), pytest.param("gone", marks=slow)]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, damage):
    """Whichever of its files is damaged; a file without which all can be read may be."""
    original = saved_twice(tmp_path / "original")
    noticed = 0
    for number, file in enumerate(files_of_a_checkpoint(original)):
        folder = shutil.copytree(original, tmp_path / str(number))
        content = bytearray((folder / file).read_bytes())
        if damage == "gone":
            (folder / file).unlink()
        elif damage == "cut":
            (folder / file).write_bytes(content[: len(content) // 2])
        else:
            for place in range(len(content) // 2, len(content), 64):
                content[place] ^= 0x10
            (folder / file).write_bytes(content)
        steps, restored = Checkpoints(folder).restore(LIKE)
        assert_identical(restored, make_state(step=steps))
        error = capsys.readouterr().err
        assert error.count("\n") == (steps == 1), file
        if error:
            noticed += 1
            assert f"warning: the checkpoint {folder}/2 is damaged: " in error
            assert names(folder) == ["1", "damaged-2"]
            assert Checkpoints(folder).latest() == 1
    assert noticed >= 2


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b'{"score": 0.', b'{"scpre": 0.2}', b"[]", b"\xff", b'{"score": "x"}'),
        *(b'{"score": NaN}', b'{"score": "nan"}', b'{"score": 1e999}', b'{"score": true}'),
        *(b'{"score": null}', b'{"score": 1' + b"0" * 400 + b"}", None),
    ],
    ids=lambda content: repr(content)[:20],
)
def test_a_damaged_score_is_named_and_the_state_is_used(tmp_path, capsys, content):
    store = Checkpoints(tmp_path, keep_best=1)
    for steps in (1, 2):
        store.save(steps, make_state(step=steps), score=steps / 10)
    store.close()
    path = tmp_path / "2" / "metrics" / "metrics"
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content)
    store = Checkpoints(tmp_path, keep=1, keep_best=1)
    steps, restored = store.restore(LIKE)
    assert steps == 2
    assert_identical(restored, make_state(step=2))
    error = capsys.readouterr().err
    assert f"warning: the score of the checkpoint {tmp_path}/2 is damaged: " in error
    assert names(tmp_path) == ["1", "2", "damaged-metrics-2"]
    # The best of those that have a score is kept; that without one goes.
    store.save(3, make_state(step=3), score=0.05)
    store.close()
    assert names(tmp_path) == ["1", "3", "damaged-metrics-2"]


def test_a_description_that_changed_on_disk_is_damage(tmp_path, capsys):
    """Bits that flipped may still be valid JSON, which fits another run."""
    about = {"model": "small"}
    store = Checkpoints(tmp_path, about=about)
    for steps in (1, 2):
        store.save(steps, make_state(step=steps))
    store.close()
    path = tmp_path / "2" / "about" / "metadata"
    path.write_text(path.read_text().replace("small", "smalk"))
    assert Checkpoints(tmp_path, about=about).restore(LIKE)[0] == 1
    error = capsys.readouterr().err
    assert "2 is damaged: about is not what was written; it is now damaged-2" in error
    # Checkpoints of earlier versions have no checksum.
    path = tmp_path / "1" / "about" / "metadata"
    path.write_text(re.sub(r', "checksum": \d+', "", path.read_text()))
    assert "checksum" not in path.read_text()
    assert Checkpoints(tmp_path, about=about).restore(LIKE)[0] == 1


def test_numbers_that_changed_on_disk_are_noticed(tmp_path, capsys, monkeypatch):
    """What the file format itself does not notice: another number in place of one."""
    saved_twice(tmp_path)
    store = Checkpoints(tmp_path)
    read = checkpoints.read_alone

    def read_changed(path, *args):
        restored = read(path, *args)
        if path == tmp_path / "2" / "state":
            restored["state"].params["layer"]["kernel"][3, 5] += 1e-4
        return restored

    monkeypatch.setattr(checkpoints, "read_alone", read_changed)
    assert store.restore(LIKE)[0] == 1
    assert "2 is damaged: params/layer/kernel is not what was written" in capsys.readouterr().err


def test_what_tensorstore_cannot_find_is_damage(tmp_path, capsys, monkeypatch):
    saved_twice(tmp_path)
    restore = checkpoints.ocp.Checkpointer.restore

    def lose(self, path, **kwargs):
        if path == tmp_path / "2" / "state":
            raise ValueError("NOT_FOUND: Failed to open [os_error_code='2' source locations='x']")
        return restore(self, path, **kwargs)

    monkeypatch.setattr(checkpoints.ocp.Checkpointer, "restore", lose)
    assert Checkpoints(tmp_path).restore(LIKE)[0] == 1
    assert "2 is damaged: NOT_FOUND" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["files", "checksums"])
def test_what_another_process_cannot_read_is_not_used(tmp_path, capsys, monkeypatch, step):
    saved_twice(tmp_path)
    complaints = iter({"files": [1], "checksums": [0, 1]}[step])

    def tell_all(text):
        return [text, "3 cut off" if next(complaints, 0) else ""]

    store = Checkpoints(tmp_path)
    monkeypatch.setattr(processes, "tell_all", tell_all)
    assert store.restore(LIKE)[0] == 1
    assert f"{tmp_path}/2 is damaged: process 1: cut off; it is" in capsys.readouterr().err


def test_no_whole_checkpoint_is_an_error_and_all_stay(tmp_path):
    """The cause may be the same for all, and none of theirs."""
    saved_twice(tmp_path)
    (tmp_path / "1" / "state").rename(tmp_path / "state")
    (tmp_path / "2" / "about" / "metadata").write_text("{")
    message = r"is whole; that of 2 steps: Expecting .* as they are; move the run's folder"
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).restore(LIKE)
    assert names(tmp_path) == ["1", "2", "state"]
    (tmp_path / "state").rename(tmp_path / "1" / "state")
    assert Checkpoints(tmp_path).restore(LIKE)[0] == 1
    assert names(tmp_path) == ["1", "damaged-2"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        PermissionError("not for you"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EMFILE, "Too many open files"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        # Tensorstore's own kind of error, while it reads.
        ValueError("NOT_FOUND: Failed to open [os_error_code='24' source locations='x']"),
        ValueError("PERMISSION_DENIED: Failed to open [os_error_code='13']"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("is_behind", [False, True])
def test_what_the_machine_lacks_is_not_damage(tmp_path, monkeypatch, error, is_behind):
    saved_twice(tmp_path)

    def restore(self, *args, **kwargs):
        if is_behind:
            raise KeyError("metadata") from error
        raise error

    monkeypatch.setattr(checkpoints.ocp.Checkpointer, "restore", restore)
    message = rf"the checkpoint {tmp_path}/2 cannot be read here: .* with --resume"
    with pytest.raises(OSError, match=message):
        Checkpoints(tmp_path).restore(LIKE)
    assert names(tmp_path) == ["1", "2"]


@pytest.mark.filterwarnings("ignore")  # asyncio, of a loop that it could not open
def test_too_few_open_files_are_not_damage(tmp_path):
    """With the system's own limit."""
    saved_twice(tmp_path)
    store = Checkpoints(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, before[1]))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        os.close(taken.pop())
        with pytest.raises(OSError, match=r"2 cannot be read here: .*Too many open files"):
            store.restore(LIKE)
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert store.restore(LIKE)[0] == 2
    assert names(tmp_path) == ["1", "2"]


def test_a_file_that_may_not_be_opened_is_not_damage(tmp_path, monkeypatch):
    """Tensorstore's own error would be a ValueError; root may open all, so the call is faked."""
    saved_twice(tmp_path)
    closed = next(path for path in (tmp_path / "2" / "state").rglob("d/*") if path.is_file())
    path_open = Path.open

    def open_others(path, *args, **kwargs):
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return path_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_others)
    with pytest.raises(OSError, match=r"2 cannot be read here: .*Permission denied"):
        Checkpoints(tmp_path).restore(LIKE)
    assert names(tmp_path) == ["1", "2"]


def test_memory_that_a_device_lacks_is_not_damage(tmp_path, monkeypatch):
    saved_twice(tmp_path)

    def unpack(stored, *, like):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(checkpoints, "from_stored", unpack)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        Checkpoints(tmp_path).restore(LIKE)
    assert names(tmp_path) == ["1", "2"]


def test_a_checkpoint_that_another_process_lacks_memory_for_ends_all(tmp_path, monkeypatch):
    saved_twice(tmp_path)
    complaint = "1 the checkpoint /2 cannot be read here"
    store = Checkpoints(tmp_path)
    monkeypatch.setattr(processes, "tell_all", lambda text: [text, complaint])
    with pytest.raises(OSError, match="process 1: the checkpoint /2 cannot be read here"):
        store.restore(LIKE)
    assert names(tmp_path) == ["1", "2"]


def test_a_half_written_checkpoint_is_none_and_goes(tmp_path):
    saved_twice(tmp_path)
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    store = Checkpoints(tmp_path)
    assert store.restore(LIKE)[0] == 1
    store.save(2, make_state(step=2))
    store.close()
    assert names(tmp_path) == ["1", "2"]


@closes_its_loop
def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(tmp_path):
    """Writing fails in the background: the system refuses files that large, as a full disk does."""
    saved_twice(tmp_path)
    store = Checkpoints(tmp_path, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    try:
        store.save(3, {"noise": jax.random.bits(jax.random.key(0), (10**6,))})
        with pytest.raises(OSError, match=r"too large.* steps 1, 2 are whole; make room") as error:
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in str(error.value.__cause__)
    store.close()
    store = Checkpoints(tmp_path, keep=1)
    assert store.restore(LIKE)[0] == 2
    save(store, 3, make_state(step=3))
    assert names(tmp_path) == ["3"]
