"""How long pruning with data takes: `python -m experiments.benchmarks.pruning_time`.

One layer of 4096 inputs and 4096 outputs at 2:4 by each method, and what statistics cost beside the
forward pass of a Transformer that they are collected in.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from experiments.benchmarks.timing import interleaved_medians, print_table, write_results
from experiments.models.text.transformer import DECODERS, Decoder
from nmjax import post_training
from nmjax.post_training.collecting import Kind, Observations, collected
from nmjax.post_training.statistics import Statistics

METHODS = ("magnitude", "wanda", "ria", "sparse_gpt", "admm", "alps")


def layer_rows(width: int) -> list[dict[str, Any]]:
    """Seconds of each method for one layer, after a first call that compiles."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(width, width)), jnp.float32)}
    plan = nmjax.make_plan(params, "2:4")
    # As many rows as inputs, whose scales differ as those of activations do.
    x = rng.normal(size=(2 * width, width)) * np.exp(rng.normal(size=width))
    gram = jnp.asarray(x.T @ x / len(x), jnp.float32)
    statistics = Statistics({"kernel": gram[None]}, {"kernel": jnp.full((1,), float(len(x)))})
    rows = []
    for name in METHODS:
        method, seconds = getattr(post_training, name), []
        for _ in range(2):
            began = time.perf_counter()
            pruned = jax.block_until_ready(method(params, plan, statistics))
            seconds.append(time.perf_counter() - began)
        change = params["kernel"] - pruned["kernel"]
        error = jnp.vdot(change, gram @ change) / jnp.vdot(
            params["kernel"], gram @ params["kernel"]
        )
        rows.append(
            {
                "method": name,
                "first seconds": seconds[0],
                "seconds": seconds[1],
                "relative error": float(error),
            }
        )
        print(rows[-1], flush=True)
    return rows


def statistics_rows(model: str, tokens: int) -> list[dict[str, Any]]:
    """The time of a batch with statistics over that of the forward pass, compiled before."""
    network = Decoder(DECODERS[model], 256)
    batch = jnp.asarray(np.random.default_rng(0).integers(0, 256, size=(4, tokens)), jnp.int32)
    params = network.init(jax.random.key(0), batch)["params"]

    def forward(params: Any, batch: jax.Array) -> Any:
        return network.apply({"params": params}, batch)

    plan = nmjax.make_plan(params, "2:4", forward=forward, inputs=(batch,))

    def collecting(kind: Kind) -> Any:
        programs: Observations = {}
        return partial(collected, programs, forward, params, [batch], plan, kind, progress=False)

    compiled = jax.jit(forward)
    functions = {
        "forward": lambda: compiled(params, batch),
        "mean_square": collecting("mean_square"),
        "gram": collecting("gram"),
    }
    medians = interleaved_medians(functions)
    return [
        {
            "model": model,
            "tokens": batch.size,
            "what": name,
            "seconds": seconds,
            "over forward": seconds / medians["forward"],
        }
        for name, seconds in medians.items()
    ]


def main() -> None:
    """Prints two tables, and writes them to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096, help="of the layer")
    parser.add_argument("--model", default="decoder_small", help="that statistics are collected in")
    parser.add_argument("--tokens", type=int, default=512, help="in each of 4 sequences")
    arguments = parser.parse_args()
    tables = {
        "statistics": statistics_rows(arguments.model, arguments.tokens),
        f"one layer of {arguments.width} x {arguments.width}": layer_rows(arguments.width),
    }
    for title, rows in tables.items():
        print_table(title, rows)
    print(f"written to {write_results('pruning_time-cpu', tables)}")


if __name__ == "__main__":
    main()
