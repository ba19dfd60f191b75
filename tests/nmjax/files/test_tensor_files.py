"""Safetensors files: what comes back, what is refused, and that a file is whole or not there."""

import json
import os
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from nmjax.files import tensor_files
from nmjax.files.tensor_files import read_tensors, write_tensors

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
DTYPES += ["float16", "bfloat16", "float32", "float64", "complex64", "float8_e4m3fn", "float8_e5m2"]
DTYPES += ["float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_arrays_come_back(tmp_path, dtype, shape):
    raw = np.random.default_rng(0).integers(0, 2, shape).astype(jnp.dtype(dtype))
    write_tensors(tmp_path / "x", {"a/b": raw, "t": raw.T}, {"key": "text"})
    tensors, metadata = read_tensors(tmp_path / "x")
    assert metadata == {"key": "text"}
    for name, array in (("a/b", raw), ("t", raw.T)):
        assert tensors[name].dtype == array.dtype
        assert tensors[name].shape == array.shape
        assert tensors[name].tobytes() == array.tobytes()


def test_another_reader_reads_it(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tensors(tmp_path / "x", {"x": jnp.asarray(x)}, {})
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "x")["x"], x)
    safetensors.numpy.save_file({"x": x}, tmp_path / "y")
    tensors, metadata = read_tensors(tmp_path / "y")
    np.testing.assert_array_equal(tensors["x"], x)
    assert metadata == {}


@pytest.mark.parametrize("dtype", ["int4", "float8_e4m3b11fnuz", "complex128"])
def test_dtypes_that_the_format_does_not_know(tmp_path, dtype):
    with pytest.raises(TypeError, match=f"x has dtype {dtype}"):
        write_tensors(tmp_path / "x", {"x": np.zeros(2, jnp.dtype(dtype))}, {})
    assert not list(tmp_path.iterdir())


# Whole or not at all


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_older_file_survives_failures(tmp_path, monkeypatch, step):
    path = tmp_path / "x"
    write_tensors(path, {"x": np.zeros(2)}, {"which": "old"})

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else ("pathlib.Path.replace",)), fail)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(path, {"x": np.ones(2)}, {"which": "new"})
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert read_tensors(path)[1] == {"which": "old"}


def test_the_data_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda self, to: (calls.append("replace"), replace(self, to))
    )
    write_tensors(tmp_path / "x", {"x": np.ones(2)}, {})
    assert calls == ["fsync", "replace", "fsync"]
    write_tensors(tmp_path / "x", {"x": np.zeros(2)}, {})
    assert read_tensors(tmp_path / "x")[0]["x"].tolist() == [0, 0]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*no does not exist"):
        write_tensors(tmp_path / "no" / "x", {"x": np.ones(2)}, {})
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "x")


# What is refused


def tensor(dtype, shape, end):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


@pytest.mark.parametrize(
    ("header", "body", "complaint"),
    [
        (tensor("F32", [3], 8), b"12345678", "not a safetensors file"),
        (tensor("F32", [2], 8), b"1234", "not a safetensors file"),
        (tensor("F32", [2], 8), b"123456789", "not a safetensors file"),
        (tensor("F32", [2**62, 8], 8), b"12345678", "not a safetensors file"),
        (tensor("F32", [0, 2**62], 0), b"", "cannot be read"),
        (tensor("F32", [1] * 70, 4), b"1234", "cannot be read"),
        (tensor("F4", [2], 1), b"1", "dtype F4 is not supported"),
        (tensor("F99", [2], 1), b"1", "not a safetensors file"),
        (tensor("BOOL", [2], 2), b"\0\2", "neither 0 nor 1"),
        ({"__metadata__": {"a": 1}}, b"", "not a safetensors file"),
        ([], b"", "not a safetensors file"),
    ],
)
def test_forged_headers(tmp_path, header, body, complaint):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + body)
    with pytest.raises(ValueError, match=complaint):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 100, struct.pack("<Q", 2**40) + b"{}"])
def test_no_safetensors_at_all(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_tensors(tmp_path / "x")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: read_tensors(tmp_path), lambda: write_tensors(tmp_path, {}, {})):
        with pytest.raises(ImportError, match=r"nmjax\[files\]"):
            call()


def test_only_whole_byte_dtypes_are_known():
    assert {dtype.itemsize for dtype in tensor_files._DTYPES.values()} == {1, 2, 4, 8}
