"""Products with 2:4 weights on a GPU against XLA's dense ones: what `gpu` times.

Every program multiplies several inputs by as many weights in a row. So neither its launch nor data
that a cache kept from the previous call is timed: together the weights are several times as large
as the second-level cache of any GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import nmjax
from experiments.benchmarks.timing import interleaved_times
from nmjax.kernels.gpu import cusparselt, decode
from nmjax.kernels.gpu.cusparselt_limits import RESULTS
from nmjax.packed.nm import PackedNM
from nmjax.packed.quantized import Quantized

Functions = dict[str, Callable[[], Any]]


class Product(NamedTuple):
    """Rows times a weight (inputs, outputs) of a dtype, and the model it comes from."""

    of: str
    rows: int
    inputs: int
    outputs: int
    dtype: str

    @property
    def repeats(self) -> int:
        """How many products have a gigabyte of weights, or four if they are quick; 2 to 8."""
        weight = self.inputs * self.outputs * jnp.dtype(self.dtype).itemsize
        return min(max(math.ceil(2 ** (32 if self.rows <= 64 else 30) / weight), 2), 8)

    @property
    def transposed(self) -> bool:
        """Whether cuSPARSELt takes the weight only as (outputs, inputs)."""
        return jnp.dtype(self.dtype).itemsize == 1

    @property
    def result(self) -> str:
        """Dtype of the product."""
        return RESULTS[self.dtype][0]


# What says most comes first: what no time is left for is skipped.
_MANY_ROWS = (
    ("cube", 8192, 8192, 8192),
    ("70 B, up", 4096, 8192, 28672),
    ("7 B, up", 4096, 4096, 11008),
    ("70 B, down", 4096, 28672, 8192),
    ("7 B, down", 4096, 11008, 4096),
    ("70 B, up", 16384, 8192, 28672),
)
MANY_ROWS = [
    Product(*shape, dtype)
    for shape in _MANY_ROWS
    for dtype in ("bfloat16", "int8", "float8_e4m3fn")
]
FEW_ROWS = [
    Product(of, rows, inputs, outputs, "bfloat16")
    for of, inputs, outputs, many in (
        ("70 B, up", 8192, 28672, (1, 16, 64, 8, 32, 4)),
        ("8 B, up", 4096, 14336, (1, 16, 8, 4)),
    )
    for rows in many
]
SMALL = [
    Product("small", 32, 64, 128, dtype)
    for dtype in ("bfloat16", "float16", "int8", "float8_e4m3fn")
]


def numbers(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    """Normal random numbers; integers up to a few dozen."""
    scale = 10 if dtype == "int8" else 1
    make = jax.jit(lambda key: (scale * jax.random.normal(key, shape)).astype(dtype))
    return make(jax.random.key(seed))


@partial(jax.jit, static_argnames="axis")
def pruned(w: jax.Array, axis: int) -> jax.Array:
    """The weight, 2:4 along an axis."""
    score = w.astype(jnp.float32) if w.dtype.itemsize == 1 else w
    return jnp.where(nmjax.nm_mask(score, 2, 4, axis), w, jnp.zeros((), w.dtype))


def multiply(x: jax.Array, w: jax.Array, result: str, transposed: bool) -> jax.Array:
    """XLA's dense product."""
    return jnp.matmul(x, w.T if transposed else w, preferred_element_type=jnp.dtype(result))


def many(product: Callable[[Any, Any], Any], xs: list[Any], ws: list[Any]) -> Callable[[], Any]:
    """All the products in one compiled program, which is traced now."""
    compiled = jax.jit(lambda xs, ws: [product(x, w) for x, w in zip(xs, ws, strict=True)])
    ready = compiled.lower(xs, ws).compile()
    return lambda: ready(xs, ws)


def milliseconds(functions: Functions, repeats: int, rounds: int) -> dict[str, float]:
    """Median time of one product of each."""
    times = interleaved_times(functions, rounds=rounds, at_least=0.02)
    return {name: 1e3 * statistics.median(seconds) / repeats for name, seconds in times.items()}


def operands(product: Product) -> tuple[list[jax.Array], list[jax.Array]]:
    """Inputs, and dense weights (inputs, outputs) that are not pruned."""
    count = range(product.repeats)
    xs = [numbers((product.rows, product.inputs), product.dtype, i) for i in count]
    # Other seeds than the inputs have, or square weights would equal them.
    ws = [numbers((product.inputs, product.outputs), product.dtype, 100 + i) for i in count]
    return xs, ws


def dense_functions(
    product: Product, xs: list[Any], ws: list[Any]
) -> dict[str, Callable[[], Functions]]:
    """XLA's products, for weights stored either way."""

    def make(name: str, multiply_one: Callable[..., Any], weights: list[Any]) -> Functions:
        return {name: many(multiply_one, xs, weights)}

    stored = {False: ws, True: [w.T for w in ws]}
    functions: dict[str, Callable[[], Functions]] = {}
    for transposed, weights in stored.items():
        name = f"dense{', transposed' if transposed else ''}"
        multiply_one = partial(multiply, result=product.result, transposed=transposed)
        functions[name] = partial(make, name, multiply_one, weights)
    if product.dtype == "float8_e4m3fn":
        one = jnp.ones((), product.result)
        scaled = [(w, one) for w in stored[True]]
        name = "dense, transposed, scaled"
        functions[name] = partial(make, name, multiply_scaled, scaled)
    return functions


def multiply_scaled(x: jax.Array, weight_and_scale: tuple[jax.Array, jax.Array]) -> jax.Array:
    """XLA's float8 product, in the form with scales that it recognizes."""
    w, scale = weight_and_scale
    return (x.astype(scale.dtype) * scale) @ (w.astype(scale.dtype) * scale).T


def time_many_rows(product: Product, rounds: int) -> dict[str, Any]:
    """Times cuSPARSELt, for weights stored either way, before and after its search."""
    xs, ws = operands(product)
    candidates = dense_functions(product, xs, ws)
    for transposed in (True,) if product.transposed else (False, True):
        name = f"sparse{', transposed' if transposed else ''}"
        candidates[name] = partial(sparse_functions, product, xs, ws, transposed)
    if product.dtype == "bfloat16":
        candidates["torch"] = partial(torch_functions, product)
    return measured(product, candidates, rounds)


def measured(
    product: Product, candidates: dict[str, Callable[[], Functions]], rounds: int
) -> dict[str, Any]:
    """One row with the times of all products that could be made, and why others could not."""
    functions: Functions = {}
    failed = {}
    for name, make in candidates.items():
        try:
            functions |= make()
        except Exception as error:  # The others are worth timing all the same.
            failed[name] = str(error)
    for kind in ("dense", "sparse"):
        if not any(name.startswith(kind) for name in functions):
            raise RuntimeError(f"no {kind} product: {failed}")
    return row(product, functions, rounds) | ({"failed": failed} if failed else {})


def sparse_functions(product: Product, xs: list[Any], ws: list[Any], transposed: bool) -> Functions:
    """Products by cuSPARSELt, before and after its search."""
    multiply_sparse = partial(cusparselt.matmul, dtype=product.result)
    name = f"sparse{', transposed' if transposed else ''}"
    compressed = []
    for w in ws:
        dense = pruned(w, -2)
        compressed.append(
            cusparselt.compress(dense.T if transposed else dense, transposed=transposed)
        )
    # Compiled before the search, so that it does not use what that finds.
    not_tuned = many(multiply_sparse, xs, compressed)
    cusparselt.tune(xs[0], compressed[0], dtype=product.result)
    return {f"{name}, not tuned": not_tuned, name: many(multiply_sparse, xs, compressed)}


def time_few_rows(product: Product, rounds: int) -> dict[str, Any]:
    """Times nmjax's kernel for few rows: its own choice, its variants, and int8 values."""
    xs, ws = operands(product)
    packed = packed_weights(ws)
    candidates = dense_functions(product, xs, ws)
    candidates["sparse"] = lambda: {"sparse": many(decode.matmul, xs, packed)}
    vectors: tuple[Literal[2, 4, 8], ...] = (8, 4, 2)
    for vector in vectors:
        candidates[f"variant, {vector} outputs a thread"] = partial(_variant, vector, xs, packed)
    candidates["int8"] = lambda: {
        "int8 values": many(decode.matmul, xs, [jax.jit(Quantized.of)(w) for w in packed])
    }
    timed = measured(product, candidates, rounds)
    if "int8 values" in timed["ms"]:
        timed["speedup of int8 values"] = (
            timed["speedup"] * timed["ms"]["sparse"] / timed["ms"]["int8 values"]
        )
    return timed


def _variant(vector: Literal[2, 4, 8], xs: list[Any], packed: list[Any]) -> Functions:
    multiply_one = partial(decode.matmul, vector=vector)
    return {f"variant, {vector} outputs a thread": many(multiply_one, xs, packed)}


def packed_weights(ws: list[jax.Array]) -> list[PackedNM]:
    """The weights, all of one shape, pruned to 2:4 and packed."""
    plan = nmjax.make_plan({"w": jax.ShapeDtypeStruct(ws[0].shape, ws[0].dtype)}, "2:4")
    pack = jax.jit(lambda w: nmjax.pack({"w": w}, plan)["w"])
    return [pack(w) for w in ws]


def row(product: Product, functions: Functions, rounds: int) -> dict[str, Any]:
    """Times, and the ratio of the fastest dense product to the fastest of ours."""
    times = milliseconds(functions, product.repeats, rounds)

    def fastest(start: str) -> float:
        return min(time for name, time in times.items() if name.startswith(start))

    result = {
        "of": product.of,
        "rows": product.rows,
        "weight": f"{product.inputs} x {product.outputs}",
        "dtype": product.dtype,
        "speedup": fastest("dense") / fastest("sparse"),
        "ms": times,
    }
    if "torch, sparse" in times:
        result["time over torch's"] = fastest("sparse") / times["torch, sparse"]
    return result


def torch_functions(product: Product) -> Functions:
    """PyTorch's own calls of cuSPARSELt, if it is installed, and its dense products."""
    try:
        import torch
        from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    SparseSemiStructuredTensor._FORCE_CUTLASS = False  # Then cuSPARSELt, its default kernel.
    settings: Any = {"dtype": torch.bfloat16, "device": "cuda"}
    # Any 2:4 mask will do, since only time is measured.
    keep = torch.tensor([1, 0, 1, 0], **settings)
    xs = [torch.randn(product.rows, product.inputs, **settings) for _ in range(product.repeats)]
    ws = [torch.randn(product.outputs, product.inputs, **settings) for _ in range(product.repeats)]
    sparse = [
        to_sparse_semi_structured((w.view(-1, 4) * keep).view(product.outputs, product.inputs))
        for w in ws
    ]

    def run(weights: list[Any]) -> None:
        with torch.inference_mode():
            for x, w in zip(xs, weights, strict=True):
                torch.nn.functional.linear(x, w)
        # PyTorch's calls return before the GPU is done.
        torch.cuda.synchronize()

    return {"torch, dense": lambda: run(ws), "torch, sparse": lambda: run(sparse)}


def lowered_products() -> Iterator[tuple[Product, str]]:
    """The text of every timed program, lowered for NVIDIA GPUs on any machine; nothing runs."""
    for product in MANY_ROWS + SMALL:
        shape = (product.inputs, product.outputs)[:: -1 if product.transposed else 1]
        w = jax.ShapeDtypeStruct(shape, product.dtype)
        x = jax.ShapeDtypeStruct((product.rows, product.inputs), product.dtype)

        def multiply_sparse(x: Any, w: Any, product: Product = product) -> jax.Array:
            compressed = cusparselt.compress(w, transposed=product.transposed)
            return cusparselt.matmul(x, compressed, dtype=product.result)

        yield product, _cuda_text(multiply_sparse, x, w)
    for product in FEW_ROWS:
        w = jax.ShapeDtypeStruct((product.inputs, product.outputs), product.dtype)
        packed = jax.eval_shape(lambda w: packed_weights([w])[0], w)
        decode.check(w.dtype, packed)
        x = jax.ShapeDtypeStruct((product.rows, product.inputs), product.dtype)
        yield product, _cuda_text(decode.matmul, x, packed)


def _cuda_text(function: Callable[..., Any], *arguments: Any) -> str:
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()
