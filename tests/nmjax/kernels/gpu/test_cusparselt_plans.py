"""Our calls of cuSPARSELt, made on the CPU to a stand-in that does what descriptors say.

What layout each operand is said to have, which attributes are set, what is kept and what is freed:
all that can be wrong on our side of the interface. The stand-in multiplies by definition. It is
compiled against declarations of ours and, where they are, against NVIDIA's headers.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nmjax import nm_mask
from nmjax.kernels import build
from nmjax.kernels.gpu.cusparselt_limits import (
    compressed_bytes,
    compressing_bytes,
    multiplying_bytes,
)

TYPES = {"bfloat16": 14, "float16": 2, "float32": 0, "int8": 3, "int32": 10, "float8_e4m3fn": 28}
ACTIVATIONS = (None, "relu", "gelu")
FIRST_CHOICE = (-1, 1, 0)
HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["our declarations", "NVIDIA's headers"])
def library(request, tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    headers = [HERE / "stand_in"]
    if request.param == "NVIDIA's headers":
        if build.missing_headers():
            pytest.skip(build.missing_headers())
        headers = build.nvidia_folders("include")
    path = tmp_path_factory.mktemp("fake") / "fake.so"
    folders = [build.FOLDER / "gpu" / "src", *headers]
    source = HERE / "fake_cusparselt.cc"
    command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", "-pthread", str(source)]
    # It must call itself also where another test has loaded NVIDIA's library.
    command += ["-Wl,-Bsymbolic", "-fno-gnu-unique", *(f"-I{folder}" for folder in folders)]
    subprocess.run([*command, "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    for name in ("start", "compress", "multiply", "search"):
        function = getattr(loaded, f"test_{name}")
        function.restype = ctypes.c_char_p
    return loaded


def numbers(shape, dtype, seed):
    values = np.random.default_rng(seed).normal(size=shape) * (9 if dtype == "int8" else 1)
    return jnp.asarray(values).astype(dtype)


def sparse(shape, dtype, transposed):
    w = numbers(shape, dtype, 0)
    mask = nm_mask(w.astype("float32"), 2, 4, axis=-1 if transposed else -2)
    return np.asarray(jnp.where(mask, w, 0).astype(dtype))


def address(x):
    return ctypes.c_void_p(x.ctypes.data)


def compress(library, w, transposed, *, device=0, nbytes=None, workspace=None):
    room = np.zeros(nbytes or compressed_bytes(w.shape, w.dtype), np.uint8)
    size = map(ctypes.c_int64, w.shape)
    said = library.test_compress(
        device, *size, transposed, TYPES[str(w.dtype)], address(w), address(room),
        ctypes.c_int64(room.size), ctypes.c_int64(workspace or compressing_bytes(w.shape)),
    )  # fmt: skip
    return room, said.decode()


def multiply(
    library, x, w, compressed, transposed, *, dtype=None, activation=None, bias=None, device=0,
    algorithm=FIRST_CHOICE, workspace=None, threads=1, prepared=0,
):  # fmt: skip
    dtype = dtype or str(x.dtype)
    y = np.asarray(jnp.zeros((x.shape[0], w.shape[not transposed]), dtype)).copy()
    three = (ctypes.c_int * 3)(*map(int, algorithm))
    said = library.test_multiply(
        device, *map(ctypes.c_int64, w.shape), transposed, TYPES[str(w.dtype)],
        ctypes.c_int64(x.shape[0]), TYPES[dtype], ACTIVATIONS.index(activation),
        None if bias is None else address(bias), three, address(x), address(compressed),
        address(y), ctypes.c_int64(workspace or multiplying_bytes(w.shape)), threads, prepared,
    )  # fmt: skip
    return y, said.decode()


def counts(library):
    four = (ctypes.c_int * 4)()
    library.test_counts(four)
    return dict(zip(("handles", "made", "destroyed", "matrices"), four, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("finish", ["plain", "bias", "bias and relu"])
def test_products(library, dtype, transposed, finish):
    shape = (16, 48) if transposed else (48, 16)
    w, x = sparse(shape, dtype, transposed), np.asarray(numbers((8, 48), dtype, 1))
    bias = None if finish == "plain" else np.asarray(numbers((16,), dtype, 2))
    relu = finish == "bias and relu"
    compressed, said = compress(library, w, transposed)
    assert said == ""
    activation = "relu" if relu else None
    y, said = multiply(library, x, w, compressed, transposed, activation=activation, bias=bias)
    assert said == ""
    expected = x.astype(float) @ (w.T if transposed else w).astype(float)
    expected += 0 if bias is None else bias.astype(float)
    expected = np.maximum(expected, 0) if relu else expected
    np.testing.assert_array_equal(y, np.asarray(jnp.asarray(expected).astype(dtype)))


@pytest.mark.parametrize("result", ["int32", "float16", "bfloat16", "int8"])
def test_bytes(library, result):
    w, x = sparse((32, 64), "int8", True), np.asarray(numbers((16, 64), "int8", 1))
    compressed, said = compress(library, w, True)
    assert said == ""
    exact = x.astype(int) @ w.T.astype(int)
    bias = np.asarray(numbers((32,), "int8", 2)).astype(np.float32)  # Not of the result's dtype.
    for given in (None, bias):
        y, said = multiply(library, x, w, compressed, True, dtype=result, bias=given)
        assert said == ""
        expected = exact if given is None else exact + given
        expected = np.clip(expected, -128, 127) if result == "int8" else expected
        np.testing.assert_array_equal(y, np.asarray(jnp.asarray(expected).astype(result)))


@pytest.mark.parametrize("result", ["float32", "float16", "bfloat16"])
def test_float8(library, result):
    w, x = (
        sparse((32, 64), "float8_e4m3fn", True),
        np.asarray(numbers((16, 64), "float8_e4m3fn", 1)),
    )
    compressed, said = compress(library, w, True)
    assert said == ""
    bias = np.asarray(numbers((32,), result, 2))
    y, said = multiply(library, x, w, compressed, True, dtype=result, bias=bias)
    assert said == ""
    expected = x.astype(float) @ w.T.astype(float) + bias.astype(float)
    np.testing.assert_array_equal(y, np.asarray(jnp.asarray(expected).astype(result)))


@pytest.mark.parametrize(
    ("dtype", "result", "offered"),
    [
        ("int8", "int8", True),
        ("float8_e4m3fn", "bfloat16", True),
        ("int8", "int32", False),
        ("float8_e4m3fn", "float16", False),
        ("bfloat16", "bfloat16", False),
    ],
)
def test_gelu_is_the_tanh_form_where_it_is_offered(library, dtype, result, offered):
    w, x = sparse((32, 64), dtype, True), np.asarray(numbers((16, 64), dtype, 1))
    w, x = (w // 8, x // 8) if dtype == "int8" else (w, x)  # Small sums: elsewhere it is ReLU.
    compressed, _ = compress(library, w, True)
    y, said = multiply(library, x, w, compressed, True, dtype=result, activation="gelu")
    if not offered:
        assert said == "cusparseLtMatmulDescSetAttribute: invalid value"
        return
    assert said == ""
    exact = x.astype(float) @ w.T.astype(float)
    expected = jnp.asarray(jnp.asarray(exact, jnp.float32))
    expected = np.asarray(
        expected * (1 + jnp.tanh(0.79788456 * (expected + 0.044715 * expected**3))) / 2
    )
    tolerance = {"atol": 0.51} if result == "int8" else {"rtol": 2**-7, "atol": 1e-5}
    np.testing.assert_allclose(y.astype(float), expected, **tolerance)


def test_bytes_are_taken_only_along_the_sum(library):
    w, x = sparse((64, 32), "int8", False), np.asarray(numbers((16, 64), "int8", 1))
    compressed, _ = compress(library, w, False)
    _, said = multiply(library, x, w, compressed, False, dtype="int32")
    assert said == "cusparseLtMatmulDescriptorInit: not supported"


def test_a_started_device_compresses_without_another_handle(library):
    before = counts(library)["handles"]
    assert library.test_start(8) == b""
    assert counts(library)["handles"] == before + 1
    _, said = compress(library, sparse((32, 16), "bfloat16", False), False, device=8)
    assert said == ""
    assert counts(library)["handles"] == before + 1


def test_what_is_prepared_needs_no_plan_later(library):
    w, x = sparse((32, 16), "float16", False), np.asarray(numbers((8, 32), "float16", 1))
    bias = np.asarray(numbers((16,), "float16", 2))
    compressed, _ = compress(library, w, False, device=7)
    settings = {"bias": bias, "activation": "relu", "device": 7}
    y, said = multiply(library, x, w, compressed, False, prepared=2, **settings)
    assert said == ""
    assert not y.any()  # Nothing has run.
    before = counts(library)
    expected = np.maximum(x.astype(float) @ w.astype(float) + bias, 0)
    y, _ = multiply(library, x, w, compressed, False, **settings)
    np.testing.assert_array_equal(y, expected.astype("float16"))
    assert counts(library) == before
    _, said = multiply(library, x[:3], w, compressed, False, prepared=2)
    assert "cusparseLtDenseDescriptorInit: not supported" in said


def test_what_was_set_up_is_kept(library):
    w, x = sparse((32, 16), "float16", False), np.asarray(numbers((8, 32), "float16", 1))
    compressed, _ = compress(library, w, False, device=5)
    before = counts(library)
    for _ in range(3):
        multiply(library, x, w, compressed, False, device=5, threads=8)
    after = counts(library)
    assert after["made"] - before["made"] == 1
    assert after["handles"] == before["handles"]
    multiply(library, x, w, compressed, False, device=5, activation="relu")
    multiply(library, x, w, compressed, False, device=5, algorithm=(3, 2, 1))
    multiply(library, x, w, compressed, False, device=6)
    last = counts(library)
    assert last["made"] - after["made"] == 3
    assert last["handles"] - after["handles"] == 1
    assert last["matrices"] == 3 * (last["made"] - last["destroyed"])


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (8, [7, 2, 2, 512]),
        (16, [6, -1, 1, 256]),  # No split: neither it nor its mode is asked for.
        (24, [5, -1, 4, 256]),
        (32, [4, 3, 0, 768]),  # The mode cannot be asked for.
        (40, [3, -1, 0, 256]),
    ],
)
def test_a_search_says_what_it_found(library, batch, found):
    w, x = sparse((32, 16), "float16", False), np.asarray(numbers((batch, 32), "float16", 1))
    compressed, _ = compress(library, w, False)
    expected, _ = multiply(library, x, w, compressed, False)
    before = counts(library)
    y, four = np.zeros_like(expected), np.zeros(4, np.int64)
    said = library.test_search(
        0, ctypes.c_int64(32), ctypes.c_int64(16), TYPES["float16"], ctypes.c_int64(batch),
        address(x), address(compressed), address(y), address(four),
    )  # fmt: skip
    assert said == b""
    np.testing.assert_array_equal(y, expected)
    assert four.tolist() == found
    after = counts(library)
    assert after["matrices"] == before["matrices"]
    y, said = multiply(library, x, w, compressed, False, algorithm=four[:3], workspace=int(four[3]))
    assert said == ""
    np.testing.assert_array_equal(y, expected)


def test_what_goes_wrong_is_said_and_leaves_nothing(library):
    w, x = sparse((32, 16), "float16", False), np.asarray(numbers((8, 32), "float16", 1))
    matrices = counts(library)["matrices"]
    assert compress(library, w, False)[1] == ""
    _, said = compress(library, w, False, nbytes=100)
    assert "bytes for a compressed weight, there are 100" in said
    assert "workspace to compress" in compress(library, w, False, workspace=1)[1]
    dense = np.asarray(numbers((32, 16), "float16", 0))
    assert "cusparseLtSpMMACompress2: invalid value" in compress(library, dense, False)[1]
    compressed, _ = compress(library, w, False)
    assert counts(library)["matrices"] == matrices
    _, said = multiply(library, x[:3], w, compressed, False)
    assert "cusparseLtDenseDescriptorInit: not supported" in said
    _, said = multiply(library, x, w, compressed, False, algorithm=(11, 1, 0))
    assert "cusparseLtMatmulAlgSetAttribute: invalid value" in said
    assert counts(library)["matrices"] == matrices
    _, said = multiply(library, x, w, compressed, False, algorithm=(1, 50, 0), workspace=4096)
    assert "wants 12800 bytes of workspace to multiply" in said


def test_our_declarations_are_those_of_nvidia(tmp_path):
    if shutil.which("g++") is None or build.missing_headers():
        pytest.skip(f"no g++, or {build.missing_headers()}")
    text = (HERE / "stand_in" / "cusparseLt.h").read_text()
    names = re.findall(r"\b(?:CUDA_R|CUSPARSE)_\w+|\bCUSPARSELT_(?!VERSION)[A-Z0-9_]+", text)
    types = re.findall(r"struct alignas\(16\) (\w+)", text)
    prints = [f'std::printf("%d ", static_cast<int>({name}));' for name in names]
    prints += [f'std::printf("%zu %zu ", sizeof({name}), alignof({name}));' for name in types]
    source = tmp_path / "print.cc"
    source.write_text(
        f"#include <cusparseLt.h>\n#include <cstdio>\nint main() {{ {' '.join(prints)} }}\n"
    )
    printed = []
    for folders in ([HERE / "stand_in"], build.nvidia_folders("include")):
        command = ["g++", "-std=c++17", *(f"-I{folder}" for folder in folders), str(source)]
        subprocess.run([*command, "-o", str(tmp_path / "print")], check=True)
        run = subprocess.run([tmp_path / "print"], capture_output=True, text=True, check=True)
        printed.append(run.stdout.split())
    assert len(printed[0]) == len(names) + 2 * len(types)
    assert printed[0] == printed[1]
