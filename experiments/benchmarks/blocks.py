"""Cost of a refresh of all block masks of ResNet-50: `python -m experiments.benchmarks.blocks`.

SUBP refreshes once an epoch. The plan is the paper's for 2.0 G multiply-adds: 66/128 of the blocks
of 32 outputs dropped, and the layers that SUBP keeps dense kept dense. The peak counts weights, old
and new masks, and XLA's temporaries.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

import nmjax
from experiments.benchmarks.timing import interleaved_medians, print_table, write_results
from experiments.models.images.networks import dense_layers, make_image_network
from nmjax.linen import make_plan

PATTERN = nmjax.Block1xN(32, 66 / 128)
SCORES = ("l1", "bpar")


def measure(score: str, rounds: int) -> dict[str, Any]:
    """Seconds and bytes of one jitted refresh in the middle of the ramp."""
    network = make_image_network("resnet50", 1000)
    x = jnp.zeros((1, 224, 224, 3))
    init = jax.jit(lambda key: network.init(key, x, train=False)["params"])
    params = init(jax.random.key(0))
    exclude = dense_layers("resnet50", blocks=True)
    plan = make_plan(network, PATTERN, x, call={"train": False}, exclude=exclude)
    subp = nmjax.soft_uniform_blocks(plan, nmjax.cubic_ramp(10, 180), score=score)
    first, step = subp.init(params, jax.random.key(1)), jnp.int32(120)
    compiled = jax.jit(subp.refresh).lower(first, params, step).compile()
    state = compiled(first, params, step)
    times = interleaved_medians({"refresh": compiled}, state, params, step, rounds=rounds)
    memory = compiled.memory_analysis()
    assert memory is not None
    # Both at once, because nothing is donated.
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "score": score,
        "pattern": str(PATTERN),
        "leaves": len(plan),
        "weights": sum(leaf.weights for leaf in plan.values()),
        "seconds": times["refresh"],
        "temporary_MiB": memory.temp_size_in_bytes / 2**20,
        "peak_MiB": (memory.temp_size_in_bytes + held) / 2**20,
    }


def main() -> None:
    """Prints the table and writes it to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed refreshes of each score")
    rounds = parser.parse_args().rounds
    rows = [measure(score, rounds) for score in SCORES]
    print_table("One refresh of the block masks of ResNet-50", rows)
    print(f"written to {write_results(f'blocks-{jax.default_backend()}', rows)}")


if __name__ == "__main__":
    main()
