"""Writing tokens one after the other: beam search, and drawing at random.

Both take a model as a function `step(tokens, index, cache) -> (logits, cache)`: logits (rows,
vocabulary) of what follows `tokens` (rows,) at position `index`. Shapes are static, so both can be
jitted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Rows(Protocol):
    """What a model remembers of the tokens so far, by row."""

    def take(self, rows: jax.Array, /) -> Self:
        """What it remembers of these rows, in their order."""


class Beams(NamedTuple):
    """Where a search stands.

    Attributes:
      index: int32 scalar, tokens written.
      tokens: (batch, beams, length) int32, of those that go on.
      scores: (batch, beams), their log probabilities; -inf for beams that hold nothing.
      best: (batch, length) int32, the best that has ended; padding after its end.
      best_score: (batch,), its log probability over the length penalty; -inf for none.
      cache: of batch * beams rows.
    """

    index: jax.Array  # type: ignore[assignment]  # a field, not tuple.index
    tokens: jax.Array
    scores: jax.Array
    best: jax.Array
    best_score: jax.Array
    cache: Any


def beam_search(
    step: Step,
    cache: Rows,
    *,
    batch: int,
    length: int,
    begin: int,
    end: int,
    padding: int,
    beams: int = 4,
    alpha: float = 0.6,
) -> tuple[jax.Array, jax.Array]:
    """Finds a likely sequence that ends, keeping the `beams` likeliest beginnings at every step.

    What is maximized is the log probability over the length penalty ((5 + tokens) / 6) ** alpha,
    the end among the tokens. It stops when no beginning can become better than the best that has
    ended. With as many beams as there are beginnings the result is the optimum.

    Args:
      step: the model.
      cache: of batch * beams rows, those of one example next to each other.
      batch: examples.
      length: most tokens, the end among them.
      begin: the token that everything starts with; is never written.
      end: the token that ends a sequence.
      padding: what fills up behind the end; is never written before it.
      beams: how many beginnings are kept.
      alpha: of the length penalty; 0 for none.

    Returns:
      Tokens (batch, length) int32 with end and padding but without the begin, and their scores
      (batch,).

    Source: Wu et al., "Google's Neural Machine Translation System", 2016, equation 14.
    """
    start = Beams(
        index=jnp.int32(0),
        tokens=jnp.full((batch, beams, length), padding, jnp.int32),
        # All beams start out equal. Only one of them counts at first, or they would stay equal.
        scores=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (batch, 1)),
        best=jnp.full((batch, length), padding, jnp.int32),
        best_score=jnp.full(batch, -jnp.inf),
        cache=cache,
    )

    def penalty(tokens: jax.Array | int) -> jax.Array:
        return jnp.float32((5 + tokens) / 6) ** alpha

    def can_improve(state: Beams) -> jax.Array:
        # Log probabilities only fall, and the longest sequence has the mildest penalty.
        bound = state.scores.max(axis=1) / penalty(length)
        # The batch stops together. An example that is done finds nothing better if it goes on.
        return (state.index < length) & jnp.any(bound > state.best_score)

    def grow(state: Beams) -> Beams:
        index = state.index
        last = jnp.where(index == 0, begin, state.tokens[:, :, index - 1])
        logits, cache = step(last.reshape(-1), index, state.cache)
        logs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beams, -1)
        logs = state.scores[..., None] + logs
        best, best_score = _end(state, logs[..., end], end, penalty(index + 1))
        # Sequences that end were scored above; those that go on may write anything else.
        logs = logs.at[..., jnp.array([begin, end, padding])].set(-jnp.inf)
        # Beams and tokens compete together: a beam may continue several times, or not at all.
        scores, chosen = jax.lax.top_k(logs.reshape(batch, -1), beams)
        beam, token = jnp.divmod(chosen, logs.shape[-1])
        tokens = jnp.take_along_axis(state.tokens, beam[..., None], axis=1)
        tokens = tokens.at[:, :, index].set(token)
        # The cache follows the beams that were chosen, so that each continues its own beginning.
        rows = (jnp.arange(batch)[:, None] * beams + beam).reshape(-1)
        return Beams(index + 1, tokens, scores, best, best_score, cache.take(rows))

    found = jax.lax.while_loop(can_improve, grow, start)
    return found.best, found.best_score


def _end(
    state: Beams, logs: jax.Array, end: int, penalty: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The best ended sequence, if every beam may end here with `logs` (batch, beams)."""
    scores = logs / penalty
    beam = jnp.argmax(scores, axis=1)
    score = jnp.take_along_axis(scores, beam[:, None], axis=1)[:, 0]
    tokens = jnp.take_along_axis(state.tokens, beam[:, None, None], axis=1)[:, 0]
    tokens = tokens.at[:, state.index].set(end)
    is_better = score > state.best_score
    best = jnp.where(is_better[:, None], tokens, state.best)
    return best, jnp.where(is_better, score, state.best_score)


def draw(
    step: Step,
    cache: Any,
    prompt: jax.Array,
    *,
    length: int,
    key: jax.Array,
    temperature: float = 1.0,
) -> jax.Array:
    """Goes on from a prompt, each token drawn from the model's distribution.

    Args:
      step: the model.
      cache: of one row an example, with room for the prompt and `length` tokens.
      prompt: (batch, prompt) int32, one token at least.
      length: tokens to add.
      key: of the draws.
      temperature: that logits are divided by; below 1, likely tokens become likelier.

    Returns:
      The tokens added, (batch, length) int32.
    """
    given = prompt.shape[1]
    padded = jnp.pad(prompt, ((0, 0), (0, length)))

    def write(carry: tuple[jax.Array, Any], index: jax.Array) -> tuple[Any, jax.Array]:
        drawn, cache = carry
        # Within the prompt the given token is read, and what the model drew is ignored.
        tokens = jnp.where(index < given, padded[:, index], drawn)
        logits, cache = step(tokens, index, cache)
        logits = logits.astype(jnp.float32) / temperature
        drawn = jax.random.categorical(jax.random.fold_in(key, index), logits)
        drawn = drawn.astype(prompt.dtype)
        return (drawn, cache), drawn

    steps = jnp.arange(given + length - 1)
    _, drawn = jax.lax.scan(write, (prompt[:, 0], cache), steps)
    # What is drawn at the prompt's last token is the first one added.
    return drawn[given - 1 :].T
