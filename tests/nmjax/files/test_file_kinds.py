"""Files of other kinds: the error says what they may be, what to do, and what is read."""

import pickle

import numpy as np
import pytest

from nmjax.files.checkpoints import read_checkpoint
from nmjax.files.tensor_files import write_tensors

READ = r"\(nmjax reads \.safetensors and \.npz files, and folders that Orbax wrote\)"
TORCH = r"convert its state dict: safetensors\.torch\.save_file"


def pickled(path):
    path.write_bytes(pickle.dumps({"a": [1.0]}))


def zipped(path):
    np.savez(path.with_suffix(".npz"), a=np.ones(2))
    path.with_suffix(".npz").rename(path)


def text(path):
    path.write_text("some text that is long enough")


@pytest.mark.parametrize(
    ("name", "write", "complaint"),
    [
        ("pytorch_model.bin", zipped, TORCH),
        ("model.pt", pickled, TORCH),
        ("model.PTH", text, TORCH),
        ("model", pickled, f"it is pickled.*{TORCH}"),
        ("model", zipped, f"zip archive.*{TORCH}.*the suffix .npz"),
        ("model.onnx", text, "export its weights to safetensors"),
        ("model.gguf", text, "GGUF"),
        ("model.h5", text, r"np\.savez"),
        ("model.msgpack", text, r"flax\.serialization"),
        ("array", lambda path: np.save(path.open("wb"), np.ones(2)), r"np\.savez"),
    ],
)
def test_other_kinds_of_files(tmp_path, name, write, complaint):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"not a safetensors file: .*{complaint}.*{READ}"):
        read_checkpoint(tmp_path / name)


def test_a_damaged_safetensors_file_is_not_called_something_else(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": np.ones(2)}, {})
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(b"\x80" + data[1:])
    with pytest.raises(ValueError, match="not a safetensors file: Error while deserializing"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_folders_and_indices_of_other_files(tmp_path):
    for i in (1, 2):
        write_tensors(tmp_path / f"part{i}.safetensors", {"a.weight": np.ones((4, 8))}, {})
    words = r"without an index \(\*\.safetensors\.index\.json\); pass one of the files, such as "
    with pytest.raises(ValueError, match=f"{words}.*part1.*{READ}"):
        read_checkpoint(tmp_path)
    # A shard alone is a file like any other.
    assert read_checkpoint(tmp_path / "part1.safetensors")["a"]["weight"].shape == (4, 8)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match=f"the index of files of another format: .*{TORCH}"):
        read_checkpoint(index)
