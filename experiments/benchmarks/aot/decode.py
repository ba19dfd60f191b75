"""A few rows times a large packed weight, compiled for TPUs: estimated time over the dense one's.

The time of a program is the larger of its bytes over the memory's bandwidth and its bundles over
the clock. The dense product is XLA's, and its bytes decide.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nmjax
from experiments.benchmarks.aot import bundles, compilers
from experiments.benchmarks.aot.rows import Row
from experiments.benchmarks.aot.statistics import statistics
from nmjax.kernels.tpu import decode as kernel

INPUTS, OUTPUTS = 4096, 14336
BATCHES = (1, 8, 64)
PATTERNS = ("2:4", "1:4", "1:8")
VALUES = ("bfloat16", "int8")
CHIPS = ("v5e", "v6e")
# What the peer's kernel takes in one step; other blocks may be faster.
PEER_BLOCK = {"block_m": 8, "block_k": 1024, "block_n": 512, "stride": 16}

Program = tuple[Callable[..., Any], tuple[Any, ...]]  # function, shapes of its arguments


def rows(dump: Path, peer: Path | None) -> Iterator[Row]:
    """Dense, packed and, with a checkout of vllm-project/tpu-inference, that project's kernel."""
    for chip, batch, values in product(CHIPS, BATCHES, VALUES):
        here = ("decode", chip, batch, values)
        programs = {"dense": partial(_dense, batch, values)}
        for pattern in PATTERNS:
            programs[f"{pattern}/nmjax"] = partial(_packed, pattern, batch, values)
            if peer is not None and (batch, values) == (8, "bfloat16"):
                programs[f"{pattern}/tpu-inference"] = partial(_peer, peer, pattern, batch)
        for name, program in programs.items():
            key = "/".join(map(str, (*here, name)))
            yield Row(key, partial(_estimate, dump, chip, batch, values, program))


def _estimate(
    dump: Path, chip: str, batch: int, values: str, program: Callable[[], Program]
) -> dict[str, Any]:
    function, shapes = program()
    here = partial(compilers.on_chip, chip)
    shapes = jax.tree.map(lambda leaf: here(leaf.shape, leaf.dtype), shapes)
    with bundles.dumped(dump):
        compiled = jax.jit(function).lower(*shapes).compile()
        found = bundles.kernels(dump)
    memory = statistics(compiled)
    # What it must read and write: its arguments and its results.
    estimate = bundles.estimate(found, memory["peak"] - memory["temporaries"], chip)
    dense = _dense_bytes(batch, values) / bundles.BANDWIDTH[chip]
    return {
        "over_dense": estimate["estimate_us"] / (1e6 * dense),
        **estimate,
        "temporaries": memory["temporaries"],
    }


def _dense_bytes(batch: int, values: str) -> int:
    weight = INPUTS * OUTPUTS * jnp.dtype(values).itemsize
    return weight + batch * (2 * INPUTS + 4 * OUTPUTS)


def _dense(batch: int, values: str) -> Program:
    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)

    return multiply, (_inputs(batch), jax.ShapeDtypeStruct((INPUTS, OUTPUTS), values))


def _packed(pattern: str, batch: int, values: str) -> Program:
    plan = nmjax.make_plan({"kernel": jax.ShapeDtypeStruct((INPUTS, OUTPUTS), "bfloat16")}, pattern)

    def tiled(w: jax.Array) -> Any:
        packed = nmjax.pack({"kernel": w}, plan)["kernel"]
        return nmjax.for_platform(packed.with_values(packed.values.astype(values)), "tpu")

    # The kernel itself: `packed_matmul` calls it by name only where JAX runs on a TPU.
    weight = jax.eval_shape(tiled, jax.ShapeDtypeStruct((INPUTS, OUTPUTS), "bfloat16"))
    if values != "int8":
        return kernel.matmul, (_inputs(batch), weight)
    scales = jax.ShapeDtypeStruct((OUTPUTS,), "float32")
    return _scaled, (_inputs(batch), weight, scales)


def _scaled(x: jax.Array, weight: nmjax.TiledNM, scales: jax.Array) -> jax.Array:
    return kernel.matmul(x, weight, scales=scales)


def _peer(checkout: Path, pattern: str, batch: int) -> Program:
    spmm = _load(checkout / "tpu_inference/kernels/structured_sparse_matmul/v1/spmm.py")
    n, m = map(int, pattern.split(":"))
    planes = (n, INPUTS // m, OUTPUTS)
    words = (n, INPUTS // m // spmm._get_metadata_packing(m), OUTPUTS)
    multiply = partial(
        spmm.structured_spmm,
        (n, m),
        rhs_sparse=True,
        contract_sparse=True,
        out_dtype=jnp.float32,
        **PEER_BLOCK,
    )
    shapes = (
        jax.ShapeDtypeStruct(planes, jnp.bfloat16),
        jax.ShapeDtypeStruct(words, jnp.int32),
        _inputs(batch),
    )
    return multiply, shapes


def _load(file: Path) -> Any:
    # The file alone: the project around it needs vLLM.
    spec = importlib.util.spec_from_file_location("peer_spmm", file)
    if spec is None or spec.loader is None or not file.exists():
        raise FileNotFoundError(f"no kernel at {file}; --peer takes a checkout of tpu-inference")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _inputs(batch: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, INPUTS), jnp.bfloat16)
