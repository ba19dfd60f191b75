"""Recovery after pruning: the sparse encoder learns from the dense one, with its masks fixed."""

from __future__ import annotations

import math

import jax
import numpy as np
import optax

import nmjax
from experiments.models.text.sentence_encoder import Params, embed


def recovered(
    params: Params,
    pruned: Params,
    plan: nmjax.Plan,
    batches: list[jax.Array],
    *,
    steps: int = 800,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
) -> Params:
    """The weights after learning from the dense network's embeddings: loss = mean(1 - cosine).

    Adam with a cosine schedule, on the encoder's layers; the embedding tables stay as they are.

    Args:
      params: of the dense network.
      pruned: of the pruned one, which it starts from and whose masks it keeps.
      plan: of the pruned network.
      batches: sentences as tokens, one array for each length.
      steps: of the optimizer.
      batch_size: sentences a step, all of one length.
      learning_rate: at the start.
    """
    masks = {name: pruned[name] != 0 for name in plan}
    learned = {name: x for name, x in pruned.items() if name.startswith("encoder.")}
    fixed = {name: x for name, x in pruned.items() if name not in learned}
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def network(learned: Params) -> Params:
        sparse = {name: x * masks[name] for name, x in learned.items() if name in masks}
        return {**fixed, **learned, **sparse}

    def loss_fn(learned: Params, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        return 1 - (embed(network(learned), tokens) * targets).sum(-1).mean()

    @jax.jit
    def step(
        learned: Params, state: optax.OptState, tokens: jax.Array, targets: jax.Array
    ) -> tuple[Params, optax.OptState]:
        gradients = jax.grad(loss_fn)(learned, tokens, targets)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(learned, updates), state

    targets = [jax.jit(embed)(params, tokens) for tokens in batches]
    rng, state = np.random.default_rng(0), tx.init(learned)
    # Lengths in proportion to their sentences; one program for each.
    shares = np.array([len(tokens) for tokens in batches]) / sum(map(len, batches))
    for at in rng.choice(len(batches), size=steps, p=shares):
        chosen = rng.choice(len(batches[at]), size=min(batch_size, len(batches[at])), replace=False)
        learned, state = step(learned, state, batches[at][chosen], targets[at][chosen])
    if not math.isfinite(float(loss_fn(learned, batches[0], targets[0]))):
        raise FloatingPointError("the recovery diverged; pass a smaller learning_rate=")
    return network(learned)
