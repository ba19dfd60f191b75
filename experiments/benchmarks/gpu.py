"""2:4 on NVIDIA GPUs: builds, checks and times everything: `python -m experiments.benchmarks.gpu`.

Takes under 8 minutes from a bare checkout, on a machine with JAX for CUDA, nvcc and NVIDIA's
packages. Whatever is missing is skipped, and the reason is printed and written. Without a GPU it
builds what it has compilers for, lowers every timed program for NVIDIA GPUs, and checks on the CPU
what runs there. If a section fails, it is written as failed, the others go on, and the exit status
is 1. The file is written after every section. Nothing new starts after `--minutes`, and within a
section nothing new starts after its own share of them. `--only` runs the rest later, into a file of
its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # The rest is PyTorch's.

import flax.linen as nn
import jax
import jax.numpy as jnp

import nmjax
from experiments.benchmarks import gpu_checks, gpu_products
from experiments.benchmarks.gpu_products import many, milliseconds, numbers
from experiments.benchmarks.timing import RESULTS, print_table
from experiments.benchmarks.train_step import TransformerBlock, make_call, make_training
from experiments.json_files import machine
from nmjax.kernels import build
from nmjax.kernels.gpu import cusparselt, cusparselt_limits
from nmjax.kernels.gpu.decode_library import check_decode
from nmjax.kernels.gpu.devices import check_gpu


class SkippedError(Exception):
    """Something that a section needs is missing."""


class Transformer(nn.Module):
    """A decoder of GPT-2 medium's size, at its defaults: 354 million parameters."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    words: int = 50304
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens (batch, length) -> logits (batch, length, words)."""
        embed = nn.Embed(self.words, self.width, dtype=self.dtype)

        def block(module: nn.Module, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return module(x), None

        # A scan, so that one block is compiled instead of 24.
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = blocks(TransformerBlock(self.heads, self.dtype, name="block"), embed(tokens), None)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x))


def built() -> dict[str, Any]:
    """Compiles what runs on GPUs, as far as there are compilers for it."""
    states, failed = {}, []
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    steps: dict[str, tuple[str, Callable[[], Any]]] = {
        # What is missing, if anything; and what compiles it.
        "cusparselt": (
            build.missing_headers() if compiler else "no g++",
            lambda: build.compile_cusparselt(str(compiler)),
        ),
        "decode": ("" if build.find_nvcc() else "no nvcc", build.compile_decode),
    }
    for name, (obstacle, compile_it) in steps.items():
        start = time.perf_counter()
        if obstacle:
            states[name] = f"skipped: {obstacle}"
            continue
        try:
            compile_it()
            states[name] = f"compiled in {time.perf_counter() - start:.0f} s"
        except RuntimeError as error:  # The other may well compile.
            states[name] = f"failed: {error}"
            failed.append(name)
    states |= {f"loaded, {name}": state for name, state in nmjax.backends().items()}
    if failed:
        raise RuntimeError(json.dumps(states))
    return states


def translated() -> dict[str, Any]:
    """Lowers every timed product for NVIDIA GPUs; needs our libraries, but no GPU."""
    try:
        cusparselt.check_library()
        check_decode()
    except NotImplementedError as reason:
        raise SkippedError(str(reason)) from None
    programs = list(gpu_products.lowered_products())
    calls = sorted({call for _, text in programs for call in re.findall(r"@(nmjax_\w+)", text)})
    return {"programs": len(programs), "calls": calls}


def checked(checks: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Errors against float64. One that is too large fails the section, but stays in the table."""
    rows: list[dict[str, Any]] = []
    try:
        rows.extend(checks())
    finally:
        if rows:
            print_table(f"Against float64: {rows[0]['what']} ...", rows)
    if not all(row["right"] for row in rows):
        raise ArithmeticError(json.dumps(rows))
    return rows


def timed(
    products: list[gpu_products.Product],
    measure: Callable[[gpu_products.Product, int], dict[str, Any]],
    rounds: int,
    deadline: float,
    minutes: float = math.inf,
) -> list[dict[str, Any]]:
    """One row for each product; if one fails, its row says so."""
    rows: list[dict[str, Any]] = []
    deadline = min(deadline, time.monotonic() + 60 * minutes)
    for product in products:
        what = {"of": product.of, "rows": product.rows, "dtype": product.dtype}
        if time.monotonic() > deadline:
            rows.append(what | {"skipped": "no time left"})
            continue
        try:
            rows.append(measure(product, rounds))
        except Exception as error:  # The next one may well run.
            traceback.print_exc()
            rows.append(what | {"failed": str(error)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def masked(size: int, rounds: int) -> list[dict[str, Any]]:
    """Times mask and apply against a copy on the device."""
    rows = []
    for axis in (-2, -1):
        # Eight matrices in turn, so that none is still in a cache: 128 MiB each at size 8192.
        ws = [numbers((size, size), "bfloat16", seed) for seed in range(8)]
        functions = {
            "copy": many(lambda w, _: jnp.copy(w), ws, ws),
            "mask and apply": many(partial(_pruned, axis), ws, ws),
        }
        ms = milliseconds(functions, len(ws), rounds)
        ratio = ms["mask and apply"] / ms["copy"]
        rows.append({"size": size, "axis": axis, "ratio": ratio, "ms": ms})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _pruned(axis: int, w: jax.Array, _: jax.Array) -> jax.Array:
    return gpu_products.pruned(w, axis)


def trained(module: Transformer, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Times an SR-STE step at 2:4, with masks recomputed in every step, against a dense step."""
    tokens = jax.random.randint(jax.random.key(0), shape, 0, module.words)
    made = {m: make_training(module, tokens, "2:4", m) for m in ("dense", "sr_ste")}
    sizes = [leaf.size for leaf in jax.tree.leaves(made["dense"].params)]
    calls: dict[str, Callable[[], Any]] = {name: make_call(one) for name, one in made.items()}
    ms = milliseconds(calls, 1, rounds)
    ratio = ms["sr_ste"] / ms["dense"]
    return {"parameters": sum(sizes), "tokens": shape, "ratio": ratio, "ms": ms}


def sections(rounds: int, deadline: float) -> dict[str, Callable[[], Any]]:
    """All sections, in order."""
    checks, few, many_rows = gpu_checks, gpu_products.FEW_ROWS, gpu_products.MANY_ROWS
    time_few, time_many = gpu_products.time_few_rows, gpu_products.time_many_rows
    anywhere = {
        "build": built,
        "translate": translated,
        "check sparse_dense in XLA": lambda: checked(lambda: checks.check_sparse_dense("xla")),
    }
    on_gpus: dict[str, Callable[[], Any]] = {
        **{
            f"check cusparselt, {dtype}{', transposed' if transposed else ''}": partial(
                checked, partial(checks.check_cusparselt, dtype, transposed)
            )
            for dtype in cusparselt_limits.RESULTS
            for transposed in ((True,) if jnp.dtype(dtype).itemsize == 1 else (False, True))
        },
        "check decode": lambda: checked(checks.check_decode),
        "check packed_matmul": lambda: checked(checks.check_packed_matmul),
        "check sparse_dense": lambda: checked(lambda: checks.check_sparse_dense("cusparselt")),
        "few rows": lambda: timed(few, time_few, rounds, deadline, minutes=1.2),
        "mask and apply": lambda: masked(8192, rounds),
        "train step": lambda: trained(Transformer(), (8, 1024), rounds),
        "many rows": lambda: timed(many_rows, time_many, rounds, deadline),
    }
    try:
        check_gpu()
    except NotImplementedError as reason:
        obstacle = str(reason)
    else:
        return anywhere | on_gpus
    small: dict[str, Callable[[], Any]] = {
        "mask and apply, small": lambda: masked(64, 3),
        "train step, small": lambda: trained(Transformer(2, 32, 2, 64), (2, 8), 3),
    }

    def skip() -> None:
        raise SkippedError(obstacle)

    return anywhere | small | dict.fromkeys(on_gpus, skip)


def main() -> None:
    """Runs the sections, prints them and writes results/gpu-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds of each side")
    parser.add_argument("--only", default="", help="text that a section's name contains")
    parser.add_argument("--minutes", type=float, default=7, help="after them nothing new begins")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    device = re.sub(r"\W+", "-", jax.devices()[0].device_kind).lower()
    part = re.sub(r"\W+", "-", arguments.only)
    path = arguments.out / f"gpu-{device}{'-' * bool(part)}{part}.json"
    results: dict[str, Any] = {"machine": machine() | {"driver": driver()}, "seconds": {}}
    with tempfile.TemporaryDirectory() as cache:
        # What an earlier run found would hide what cuSPARSELt's own first choice takes.
        os.environ["NMJAX_CACHE_DIR"] = cache
        for name, section in sections(arguments.rounds, deadline).items():
            if arguments.only not in name:
                continue
            start = time.monotonic()
            results[name] = outcome(section, deadline)
            results["seconds"][name] = round(time.monotonic() - start, 1)
            print(f"{name}: {results['seconds'][name]} s, {str(results[name])[:300]}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(f"written to {path}")
    # True exits with status 1.
    sys.exit('"failed": ' in json.dumps(results))


def outcome(section: Callable[[], Any], deadline: float) -> Any:
    """What a section returned, or why it returned nothing."""
    try:
        if time.monotonic() > deadline:
            raise SkippedError("no time left")
        return section()
    except SkippedError as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # One broken kernel does not hide the others.
        traceback.print_exc()
        return {"failed": str(error)}


def driver() -> str | None:
    """Driver version, power limit and clock limit, if nvidia-smi reports them."""
    if shutil.which("nvidia-smi") is None:
        return None
    names = "driver_version,power.limit,clocks.max.sm"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
