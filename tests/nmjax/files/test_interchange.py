"""Other libraries' layouts, read back by those libraries; and spelled out where they are absent."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import nmjax
from nmjax.files.interchange import to_bsr, to_semi_structured
from tests.nmjax.packed_weights import prune_and_pack

try:
    import torch
    from torch.sparse import SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(
    torch is None, reason="PyTorch, the other side, is not installed: pip install 'nmjax[torch]'"
)

SHAPES = [(32, 32), (64, 32), (32, 64), (96, 128), (256, 160)]  # (inputs, outputs)


def normal(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def packed_of(w, pattern, **options):
    params = {"kernel": w}
    if w.ndim == 4:
        options["axes"] = {"kernel": nmjax.Axes((-2,), (-1,), (-4, -3))}
    return prune_and_pack(params, nmjax.make_plan(params, pattern, **options))["kernel"]


def out_in(packed):
    """The pruned matrix (outputs, inputs) of a plain kernel."""
    return np.asarray(nmjax.unpack(packed)).T


def to_torch(x):
    x = np.array(x, order="C")
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def few_nonzeros(shape, dtype):
    """Groups with nothing, one or two weights that are not zero."""
    rng = np.random.default_rng(1)
    return normal(shape, dtype) * jnp.asarray(rng.integers(0, 2, shape), dtype)


# 2:4 and CUTLASS metadata


@needs_torch
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("make", [normal, few_nonzeros])
def test_torch_makes_the_same_pair(shape, dtype, make):
    packed = packed_of(make(shape, dtype), "2:4")
    ours = to_semi_structured(packed)
    values, meta = sparse_semi_structured_from_dense_cutlass(to_torch(out_in(packed)))
    np.testing.assert_array_equal(ours.values.view(np.int16), values.view(torch.int16).numpy())
    np.testing.assert_array_equal(ours.meta, meta.numpy())


@needs_torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_reads_the_pair(dtype):
    packed = packed_of(normal((96, 64), dtype), "2:4")
    values, meta = map(to_torch, to_semi_structured(packed))
    expected = to_torch(out_in(packed))
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), expected)
    tensor = SparseSemiStructuredTensorCUTLASS(expected.shape, values, meta, None, None, None)
    assert torch.equal(tensor.to_dense(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pair_spelled_out(shape):
    """Nibbles, rows and columns by the words of CUTLASS's host_reorder.h, entry by entry."""
    dense = out_in(packed := packed_of(few_nonzeros(shape, "float16"), "2:4"))
    rows, columns = dense.shape
    values = np.zeros((rows, columns // 2), np.float16)
    meta = np.zeros(rows * columns // 16, np.uint16)
    fill = {(): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3)}
    for r in range(rows):
        for word in range(columns // 16):
            bits = 0
            for i in range(4):
                at = 16 * word + 4 * i
                kept = tuple(np.nonzero(dense[r, at : at + 4])[0].tolist())
                first, second = fill.get(kept, kept)
                bits |= (first | second << 2) << 4 * i
                values[r, at // 2 : at // 2 + 2] = dense[r, [at + first, at + second]]
            to_row, to_column = r // 32 * 32 + r % 8 * 4 + r % 32 // 8, word
            if to_row % 2 == 0 and word % 2 == 1:
                to_row, to_column = to_row + 1, word - 1
            elif to_row % 2 == 1 and word % 2 == 0:
                to_row, to_column = to_row - 1, word + 1
            meta[to_column // 2 * 2 * rows + to_row * 2 + to_column % 2] = bits
    pair = to_semi_structured(packed)
    np.testing.assert_array_equal(pair.values, values)
    np.testing.assert_array_equal(pair.meta.view(np.uint16).ravel(), meta)


@pytest.mark.parametrize(
    ("w", "pattern", "complaint"),
    [
        (normal((32, 32), "float16"), "1:4", "must be 2:4, got 1:4"),
        (normal((32, 32), "float16"), "4:8", "must be 2:4, got 4:8"),
        (normal((32, 32)), "2:4", "16 bits, got float32"),
        (normal((32, 48), "float16"), "2:4", "48 outputs and 32 inputs"),
        (normal((48, 32), "float16"), "2:4", "32 outputs and 48 inputs"),
        (normal((3, 3, 32, 32), "float16"), "2:4", "expected one matrix"),
    ],
)
def test_what_is_no_semi_structured_matrix(w, pattern, complaint):
    with pytest.raises(ValueError, match=complaint):
        to_semi_structured(packed_of(w, pattern))


def test_attention_projections_are_matrices():
    """Heads are taken together, on whichever side they are."""
    w = normal((4, 8, 32), "float16")
    packed = packed_of(w, "2:4", axes={"kernel": nmjax.Axes((-3, -2), (-1,))})
    flat = packed_of(w.reshape(32, 32), "2:4")
    for ours, expected in zip(to_semi_structured(packed), to_semi_structured(flat), strict=True):
        np.testing.assert_array_equal(ours, expected)


# BSR


@pytest.mark.parametrize("pattern", ["1x4@0.5", "1x4@0.5/layer", "1x8@0.9/layer", "1x1@0.3"])
def test_scipy_reads_blocks(pattern):
    packed = packed_of(normal((20, 16)), pattern)
    bsr = to_bsr(packed)
    matrix = scipy.sparse.bsr_matrix((bsr.data, bsr.indices, bsr.indptr), bsr.shape)
    matrix.check_format(full_check=True)
    assert matrix.has_sorted_indices
    np.testing.assert_array_equal(matrix.toarray(), out_in(packed))
    x = np.random.default_rng(0).normal(size=(16, 20)).astype("float32")
    np.testing.assert_allclose(matrix @ x.T, (x @ nmjax.unpack(packed)).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["1x4@0.5", "1x4@0.5/layer"])
def test_scipy_reads_convolutions(pattern):
    packed = packed_of(normal((3, 2, 8, 12)), pattern)
    bsr = to_bsr(packed)
    assert bsr.data.shape[1:] == (4, 6)
    matrix = scipy.sparse.bsr_matrix((bsr.data, bsr.indices, bsr.indptr), bsr.shape)
    oihw = np.asarray(nmjax.unpack(packed)).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(matrix.toarray(), oihw.reshape(12, -1))


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["1x4@0.5", "1x4@0.5/layer"])
def test_torch_reads_blocks(pattern, dtype):
    packed = packed_of(normal((20, 16), dtype), pattern)
    bsr = to_bsr(packed)
    indptr, indices, data = map(to_torch, (bsr.indptr, bsr.indices, bsr.data))
    tensor = torch.sparse_bsr_tensor(indptr, indices, data, bsr.shape, check_invariants=True)
    assert torch.equal(tensor.to_dense(), to_torch(out_in(packed)))


def test_a_stack_is_no_matrix():
    stack = normal((3, 8, 4))
    for pattern in ("1x2@0.5", "1x2@0.5/layer"):
        plan = nmjax.make_plan({"kernel": stack[0]}, pattern)
        packed = prune_and_pack({"kernel": stack}, plan)["kernel"]
        with pytest.raises(ValueError, match=r"a stack of shape \(3, 8, 4\)"):
            to_bsr(packed)
        assert to_bsr(jax.tree.map(lambda x: x[1], packed)).shape == (4, 8)


def test_a_layer_computes_the_same_with_scipy():
    layer = nn.Dense(16, use_bias=False)
    x = normal((5, 24))
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    plan = nmjax.make_plan(params, "1x8@0.5")
    bsr = to_bsr(prune_and_pack(params, plan)["kernel"])
    matrix = scipy.sparse.bsr_matrix((bsr.data, bsr.indices, bsr.indptr), bsr.shape)
    y = layer.apply({"params": nmjax.prune(params, plan)}, x)
    np.testing.assert_allclose((matrix @ np.asarray(x).T).T, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convert", [to_semi_structured, to_bsr])
def test_what_is_not_packed_that_way(convert):
    other = {to_semi_structured: "1x4@0.5", to_bsr: "2:4"}[convert]
    params = {"kernel": jnp.ones((32, 32), jnp.bfloat16)}
    packed = prune_and_pack(params, nmjax.make_plan(params, other))
    for weight in (packed["kernel"], params["kernel"]):
        with pytest.raises(TypeError, match="expected a Packed"):
            convert(weight)
