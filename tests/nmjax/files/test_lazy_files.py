"""Files are read header first: their size does not matter, and only regular files are opened."""

import io
import json
import os
import struct
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest

import nmjax
from nmjax.files.checkpoints import open_checkpoint, read_checkpoint
from nmjax.files.npz_files import open_npz
from nmjax.files.tensor_files import open_tensors, read_tensors, write_tensors
from nmjax.trees.leaves import named_leaves

GIGABYTES = 50 * 2**30


@contextmanager
def memory_below(limit):
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit


def write_sparse(path, header, size):
    """A file with a header and zeros that take no place on disk."""
    text = json.dumps(header).encode() if header is not None else b""
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)


def test_a_header_of_a_huge_file(tmp_path):
    big = {"dtype": "F32", "shape": [GIGABYTES // 4096, 1024], "data_offsets": [0, GIGABYTES]}
    small = {"dtype": "I8", "shape": [2], "data_offsets": [GIGABYTES, GIGABYTES + 2]}
    write_sparse(tmp_path / "x", {"a.kernel": big, "b": small}, GIGABYTES + 2)
    with memory_below(2**20):
        file = open_tensors(tmp_path / "x")
        assert file.tensors["a.kernel"].shape == (GIGABYTES // 4096, 1024)
        ((name, array),) = file.read(["b"])
        assert (name, array.tolist()) == ("b", [0, 0])
        shapes = open_checkpoint(tmp_path / "x").shapes
        assert shapes["a"]["kernel"].shape == (GIGABYTES // 4096, 1024)


@pytest.mark.parametrize("size", [2**20, GIGABYTES])
def test_zeros_are_refused_at_once(tmp_path, size):
    write_sparse(tmp_path / "x.safetensors", None, size)
    with memory_below(2**20), pytest.raises(ValueError, match="not a safetensors file"):
        nmjax.load_packed(tmp_path / "x.safetensors")


def test_a_file_that_becomes_shorter(tmp_path):
    write_tensors(tmp_path / "x", {"a": np.ones(100)}, {})
    file = open_tensors(tmp_path / "x")
    os.truncate(tmp_path / "x", 200)
    with pytest.raises(ValueError, match=r"a: the file has become shorter"):
        dict(file.read(["a"]))


def test_a_header_with_a_name_twice(tmp_path):
    entry = '"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    text = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + b"1")
    with pytest.raises(ValueError, match="the header has a key twice"):
        open_tensors(tmp_path / "x")


@pytest.mark.parametrize("read", [read_tensors, read_checkpoint, nmjax.load_packed])
def test_pipes_and_devices_are_not_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")  # Opening it would wait for a writer.
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path / "pipe", tmp_path / "pipe.npz", "/dev/zero", "/dev/random"):
        with pytest.raises(ValueError, match="is not a regular file"):
            read(path)


# Dtypes that NumPy and JAX lack


def write_with_f4(path):
    write_tensors(path, {"a/kernel": np.ones((8, 4), np.float32)}, {})
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    end = len(body)
    header["b/blocks"] = {"dtype": "F4", "shape": [8], "data_offsets": [end, end + 4]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body + b"1234")


def test_tensors_of_unknown_dtypes_are_left_out_by_name(tmp_path):
    write_with_f4(tmp_path / "x")
    with pytest.warns(UserWarning, match=r"left out.*no such dtypes: b/blocks \(F4\)"):
        tree = read_checkpoint(tmp_path / "x")
    assert named_leaves(tree).keys() == {"a/kernel"}
    assert open_tensors(tmp_path / "x").tensors["b/blocks"].dtype is None
    with pytest.raises(ValueError, match="b/blocks: the dtype F4 is not supported"):
        read_tensors(tmp_path / "x")


# Archives of NumPy


def save_npz(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of duplicates.
        for name, data in members:
            archive.writestr(name, data)


def npy(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def header_of(shape):
    data = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(data, header)
    return data.getvalue()


def test_headers_of_an_npz(tmp_path):
    arrays = {
        "a/kernel": np.arange(12.0).reshape(3, 4),
        "b": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "c": np.float16(3),
        "d": np.zeros((0, 2)),
    }
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    file = open_npz(tmp_path / "x.npz")
    assert {n: (x.shape, x.dtype) for n, x in file.arrays.items()} == {
        n: (x.shape, x.dtype) for n, x in arrays.items()
    }
    for name, array in file.read(["b", "a/kernel", "c", "d"]):
        np.testing.assert_array_equal(array, arrays[name])


def test_an_npz_that_would_grow(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(2**24), b=np.ones(2))
    assert (tmp_path / "x.npz").stat().st_size < 2**18
    with memory_below(2**20):
        file = open_npz(tmp_path / "x.npz")
        ((_, array),) = file.read(["b"])
    assert array.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("a.npy", npy(np.ones(2))), ("readme.txt", b"text")], "'readme.txt' is not an array"),
        ([("a.npy", b"text")], "magic string"),
        ([("a.npy", b"")], "not an .npz file of plain arrays"),
        ([("a.npy", npy(np.ones(2))), ("a.npy", npy(np.ones(3)))], "two arrays are named 'a'"),
        ([("a.npy", npy(np.ones(2))[:-1])], "'a' has another size than its header says"),
        ([("a.npy", npy(np.ones(2)) + b"more")], "'a' has another size than its header says"),
        ([("a.npy", header_of((10**12,)))], "'a' has another size than its header says"),
        ([("a.npy", header_of((-4, -4)) + bytes(64))], "not an .npz file of plain arrays"),
        ([("a.npy", npy(np.array([{}], object)))], "'a' holds Python objects"),
        ([("a.npy", npy(np.zeros(2, [("x", "f4")])))], "'a' was lost|dtype of a was lost"),
        ([("/".join("a" * 10_000) + ".npy", npy(np.ones(2)))], "has more than 64 levels"),
        ([("a.npy", npy(np.ones(2))), ("a/b.npy", npy(np.ones(2)))], "below"),
        ([("a/b\nc.npy", npy(np.ones(2)))], r"the name 'a/b\\nc' has a line break"),
    ],
)
def test_archives_that_are_refused_in_one_line(tmp_path, members, complaint):
    save_npz(tmp_path / "x.npz", members)
    with pytest.raises(ValueError, match=complaint) as error:
        read_checkpoint(tmp_path / "x.npz")
    assert str(tmp_path / "x.npz") in str(error.value)
    assert "\n" not in str(error.value)


def test_names_that_differ_in_dots_only(tmp_path):
    write_tensors(tmp_path / "x", {"a.b": np.ones(2), "a/b": np.ones(2)}, {"format": "pt"})
    with pytest.raises(ValueError, match="two names differ only in dots and slashes"):
        read_checkpoint(tmp_path / "x")
