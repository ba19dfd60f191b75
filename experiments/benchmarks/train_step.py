"""What sparse training adds to a step: STE and SR-STE against the dense step, in one run.

    python -m experiments.benchmarks.train_step

Each step computes loss and gradient, adds the optimizer's update (SGD with momentum) and writes the
parameters in place, as a real loop does with donated buffers. The masks are recomputed at every
step. With SR-STE the forward pass and the optimizer share one computation of them, unless XLA finds
it cheaper to repeat it than to store its result. It does so for the 2:4 masks of attention kernels,
whose sparse weights it would have to reshape. The table counts the loops in the compiled step that
compute a mask.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import nmjax
from experiments.benchmarks.timing import interleaved_medians, print_table, write_results
from nmjax.linen import make_plan

METHODS = ("dense", "ste", "sr_ste")


class Training(NamedTuple):
    """A jitted training step `(params, opt_state) -> (params, opt_state)`, and where it starts."""

    step: Any
    params: Any
    opt_state: Any
    plan: nmjax.Plan


class MLP(nn.Module):
    """Three Dense layers of equal width."""

    width: int = 1024

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, width) -> (batch, width)."""
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.width)(x)


class TransformerBlock(nn.Module):
    """A pre-norm encoder block: attention, then a feed-forward layer four times as wide."""

    heads: int = 8
    dtype: Any = None  # Of the computation; None for that of the parameters.

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, tokens, features) -> the same."""
        width, dtype = x.shape[-1], self.dtype
        attend = nn.MultiHeadDotProductAttention(self.heads, dtype=dtype)
        x = x + attend(nn.LayerNorm(dtype=dtype)(x))
        hidden = nn.gelu(nn.Dense(4 * width, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x)))
        return x + nn.Dense(width, dtype=dtype)(hidden)


CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "MLP 3x1024, batch 128": (MLP(), (128, 1024)),
    "MLP 3x1024, batch 2048": (MLP(), (2048, 1024)),
    "Transformer block 512, 16x128 tokens": (TransformerBlock(), (16, 128, 512)),
}


def make_training(module: nn.Module, x: jax.Array, pattern: str, method: str) -> Training:
    """The training of `module` on the batch `x` with one of `METHODS`."""
    params = module.init(jax.random.key(0), x)["params"]
    plan = make_plan(module, pattern, x)
    refine = nmjax.add_sparse_refined(plan, 2e-4) if method == "sr_ste" else optax.identity()
    tx = optax.chain(refine, optax.sgd(1e-3, momentum=0.9))

    def loss(params: Any) -> jax.Array:
        if method != "dense":
            params = nmjax.sparsify(params, plan)
        y: Any = module.apply({"params": params}, x)
        return jnp.mean(jnp.square(y - 1))

    def step(params: Any, opt_state: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return Training(jax.jit(step, donate_argnums=(0, 1)), params, tx.init(params), plan)


def mask_computations(training: Training) -> int:
    """Counts the compiled step's loops that compute a mask; only those look at a number's bits."""
    lowered = training.step.lower(training.params, training.opt_state)
    text = lowered.compile().as_text()
    # Each computation of the HLO text begins at the left margin; fused loops are computations.
    loops = re.split(r"\n(?=%\S+ \(.*\{\n)", text)
    return sum("bitcast-convert(" in loop for loop in loops)


def make_call(training: Training) -> Callable[[], Any]:
    """A function that takes one more step at each call."""
    state = training.params, training.opt_state

    def call() -> Any:
        nonlocal state
        state = training.step(*state)
        return state

    return call


def measure(patterns: tuple[str, ...], rounds: int) -> Iterator[dict[str, Any]]:
    """One row of the table for each case, pattern and sparse method."""
    for case, (module, shape) in CASES.items():
        x = jax.random.normal(jax.random.key(1), shape)
        for pattern in patterns:
            made = {method: make_training(module, x, pattern, method) for method in METHODS}
            calls = {method: make_call(training) for method, training in made.items()}
            masks = {method: mask_computations(training) for method, training in made.items()}
            seconds = interleaved_medians(calls, rounds=rounds)
            for method in METHODS[1:]:
                yield {
                    "case": case,
                    "pattern": pattern,
                    "method": method,
                    "seconds": seconds[method],
                    "dense_seconds": seconds["dense"],
                    "ratio": seconds[method] / seconds["dense"],
                    "sparse leaves": len(made[method].plan),
                    "masks computed": masks[method],
                }


def main() -> None:
    """Prints the table and writes it to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:16"])
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each method")
    flags = parser.parse_args()
    rows = list(measure(tuple(flags.patterns), flags.rounds))
    print_table("Training step against the dense step", rows)
    write_results("train_step-cpu", rows)


if __name__ == "__main__":
    main()
