"""Transformers: encoder and decoder for translation, decoder only for language modeling.

Normalization comes before each sub-layer and once more at the end of each stack ("pre-norm"): that
trains without the care that the paper's order, after each sub-layer, asks of the warm-up. Otherwise
as in the paper: sinusoidal positions, ReLU, biases everywhere, and one embedding for what is read,
what is written and the output's logits. Without the embedding, the base size has the 44,140,544
parameters of PyTorch's `nn.Transformer()`; with the paper's 37,000 tokens it has 63.1 million,
where the paper's table says 65.

Source: Vaswani et al., "Attention Is All You Need", 2017; Xiong et al., "On Layer Normalization in
the Transformer Architecture", 2020, for the order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.text.attention import (
    Attention,
    KeysValues,
    causal_mask,
    padding_mask,
    sinusoids,
)


@dataclass(frozen=True)
class Size:
    """How large a Transformer is.

    Attributes:
      width: of every position's vector.
      hidden: of the layer between the two of a feed-forward network.
      heads: of attention; they divide `width`.
      layers: of each stack.
      dropout: share of each sub-layer's output, and of the embeddings, dropped in training.
    """

    width: int
    hidden: int
    heads: int
    layers: int
    dropout: float = 0.0


# Of encoder and decoder. The first two are the paper's, table 3.
TRANSFORMERS = {
    "transformer_base": Size(512, 2048, 8, 6, 0.1),
    "transformer_big": Size(1024, 4096, 16, 6, 0.3),
    "transformer_tiny": Size(64, 256, 4, 2),
}
# Decoder-only models.
DECODERS = {
    "decoder_tiny": Size(64, 256, 4, 2),
    "decoder_small": Size(256, 1024, 8, 6),
    "decoder_medium": Size(768, 3072, 12, 12, 0.1),
}


class Cache(NamedTuple):
    """What decoding keeps from one token to the next; every array is (batch, ...).

    Attributes:
      own: of each layer, keys and values of the tokens so far, zero after them.
      memory: of each layer, keys and values of the source; empty for decoder-only models.
      mask: which source tokens may be seen, (batch, 1, 1, source); None for decoder-only models.
    """

    own: tuple[KeysValues, ...]
    memory: tuple[KeysValues, ...] = ()
    mask: jax.Array | None = None

    def repeat(self, times: int) -> Cache:
        """Every example `times` times, one copy after the other."""
        # `repeat`, not `tile`: `beam_search` wants the rows of one example next to each other.
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), self)

    def take(self, rows: jax.Array) -> Cache:
        """The tokens so far of other rows; a row keeps its source."""
        # A beam only ever continues a beam of its own example, so its source is right already.
        return self._replace(own=jax.tree.map(lambda leaf: leaf[rows], self.own))


class Layer(nn.Module):
    """Self-attention, attention to a source where there is one, and a feed-forward network.

    Attributes:
      size: of the model.
      reads_source: whether it attends to a source.
      dtype: of the computation.
    """

    size: Size
    reads_source: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes the sub-layers, each with its normalization."""
        size = self.size
        self.attention_norm = nn.LayerNorm(dtype=self.dtype)
        self.attention = Attention(size.width, size.heads, self.dtype)
        if self.reads_source:
            self.source_norm = nn.LayerNorm(dtype=self.dtype)
            self.source_attention = Attention(size.width, size.heads, self.dtype)
        self.hidden_norm = nn.LayerNorm(dtype=self.dtype)
        self.hidden = nn.Dense(size.hidden, dtype=self.dtype)
        self.output = nn.Dense(size.width, dtype=self.dtype)
        self.drop = nn.Dropout(size.dropout)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        source: KeysValues | None = None,
        source_mask: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Maps (batch, positions, width) to the same; masks as in `Attention`."""
        normed = self.attention_norm(x)
        y = self.attention(normed, self.attention.keys_values(normed), mask)
        return self._rest(x, y, source, source_mask, train=train)

    def step(
        self,
        x: jax.Array,
        index: jax.Array,
        own: KeysValues,
        source: KeysValues | None = None,
        source_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Maps one position, (batch, 1, width), at `index`; also returns `own` with it added."""
        normed = self.attention_norm(x)
        # Before attention, so that a token sees itself, as in training.
        own = own.write(index, self.attention.keys_values(normed))
        # The cache has its full length from the start, since shapes are static: the rest is still
        # empty.
        seen = jnp.arange(own.keys.shape[1]) <= index
        y = self.attention(normed, own, seen[None, None, None])
        return self._rest(x, y, source, source_mask, train=False), own

    def _rest(
        self,
        x: jax.Array,
        y: jax.Array,
        source: KeysValues | None,
        source_mask: jax.Array | None,
        *,
        train: bool,
    ) -> jax.Array:
        """Everything after self-attention, whose output is `y`."""
        x = x + self.drop(y, deterministic=not train)
        if source is not None and source_mask is not None:
            y = self.source_attention(self.source_norm(x), source, source_mask)
            x = x + self.drop(y, deterministic=not train)
        y = self.output(nn.relu(self.hidden(self.hidden_norm(x))))
        return x + self.drop(y, deterministic=not train)


class Stack(nn.Module):
    """Layers one after the other, and a normalization.

    Attributes:
      size: of the model.
      reads_source: whether the layers attend to a source.
      dtype: of the computation.
    """

    size: Size
    reads_source: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes the layers."""
        count = self.size.layers
        # Flax names the entries of a list layers_0, layers_1, ..., which path rules address.
        self.layers = [Layer(self.size, self.reads_source, self.dtype) for _ in range(count)]
        self.norm = nn.LayerNorm(dtype=self.dtype)

    def sources(self, memory: jax.Array) -> tuple[KeysValues, ...]:
        """Keys and values of a source, (batch, source, width), for each layer."""
        return tuple(layer.source_attention.keys_values(memory) for layer in self.layers)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        sources: tuple[KeysValues, ...] = (),
        source_mask: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Maps (batch, positions, width) to the same."""
        for index, layer in enumerate(self.layers):
            source = sources[index] if sources else None
            x = layer(x, mask, source, source_mask, train=train)
        return self.norm(x)

    def step(self, x: jax.Array, index: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Maps one position, (batch, 1, width), at `index`."""
        kept = []
        for number, layer in enumerate(self.layers):
            source = cache.memory[number] if cache.memory else None
            x, own = layer.step(x, index, cache.own[number], source, cache.mask)
            kept.append(own)
        return self.norm(x), cache._replace(own=tuple(kept))

    def empty(self, batch: int, length: int) -> tuple[KeysValues, ...]:
        """Keys and values of no tokens yet, with room for `length`."""
        shape = (batch, length, self.size.heads, self.size.width // self.size.heads)
        nothing = jnp.zeros(shape, self.dtype)
        # The same zeros for all: JAX never writes into an array.
        return (KeysValues(nothing, nothing),) * self.size.layers


class Tokens(nn.Module):
    """Tokens as vectors with positions, and vectors as logits, with one table for both.

    Attributes:
      vocabulary: how many tokens there are.
      width: of the vectors.
      dropout: share of the vectors' entries dropped in training.
      dtype: of the vectors.
    """

    vocabulary: int
    width: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes the table. Its scale gives vectors and logits a variance of about one."""
        init = nn.initializers.normal(1 / math.sqrt(self.width))
        self.table = nn.Embed(
            self.vocabulary, self.width, embedding_init=init, dtype=self.dtype, name="embedding"
        )
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps (batch, positions) to (batch, positions, width)."""
        x = self._scaled(tokens) + sinusoids(tokens.shape[1], self.width).astype(self.dtype)
        return self.drop(x, deterministic=not train)

    def at(self, tokens: jax.Array, index: jax.Array, length: int) -> jax.Array:
        """Maps (batch,) tokens, all at position `index` < `length`, to (batch, 1, width)."""
        # The whole table is a constant of the program: `index` is traced, and `sinusoids` is NumPy.
        position = jnp.asarray(sinusoids(length, self.width), self.dtype)[index]
        return self._scaled(tokens)[:, None] + position

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps (..., width) to (..., vocabulary)."""
        return self.table.attend(x)

    def _scaled(self, tokens: jax.Array) -> jax.Array:
        # Section 3.4. The table's entries are small for the logits' sake; this makes the vectors'
        # variance one again.
        return self.table(tokens) * math.sqrt(self.width)


class Transformer(nn.Module):
    """Encoder and decoder.

    Attributes:
      size: of both.
      vocabulary: tokens, of both languages together.
      padding: the token that fills up a source; nothing ever looks at it.
      dtype: of the computation; parameters are float32.
    """

    size: Size
    vocabulary: int
    padding: int = 0
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes embedding, encoder and decoder."""
        size = self.size
        self.tokens = Tokens(self.vocabulary, size.width, size.dropout, self.dtype)
        self.encoder = Stack(size, False, self.dtype)
        self.decoder = Stack(size, True, self.dtype)

    def __call__(self, source: jax.Array, target: jax.Array, *, train: bool = False) -> jax.Array:
        """Predicts each token that comes after one of `target`.

        Args:
          source: (batch, source) tokens, filled up with `padding`.
          target: (batch, positions) tokens, the first a mark of the beginning. Whatever fills them
            up comes last, so that no token before it sees it.
          train: whether to drop out; needs the random stream "dropout".

        Returns:
          Logits (batch, positions, vocabulary).
        """
        seen = padding_mask(source, self.padding)
        memory = self.encoder(self.tokens(source, train=train), seen, train=train)
        x = self.decoder(
            self.tokens(target, train=train),
            causal_mask(target.shape[1]),
            self.decoder.sources(memory),
            seen,
            train=train,
        )
        return self.tokens.logits(x)

    def begin(self, source: jax.Array, length: int) -> Cache:
        """Encodes a source, (batch, source), for decoding up to `length` tokens."""
        seen = padding_mask(source, self.padding)
        memory = self.encoder(self.tokens(source), seen)
        own = self.decoder.empty(len(source), length)
        return Cache(own, self.decoder.sources(memory), seen)

    def step(self, tokens: jax.Array, index: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits (batch, vocabulary) of what follows `tokens` (batch,) at position `index`."""
        return _step(self.tokens, self.decoder, tokens, index, cache)


class Decoder(nn.Module):
    """A decoder-only language model.

    Attributes:
      size: of it.
      vocabulary: how many tokens there are.
      dtype: of the computation; parameters are float32.
    """

    size: Size
    vocabulary: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes embedding and layers."""
        size = self.size
        self.tokens = Tokens(self.vocabulary, size.width, size.dropout, self.dtype)
        self.decoder = Stack(size, False, self.dtype)

    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Predicts each next token: (batch, positions) to (batch, positions, vocabulary)."""
        x = self.tokens(tokens, train=train)
        x = self.decoder(x, causal_mask(tokens.shape[1]), train=train)
        return self.tokens.logits(x)

    def begin(self, batch: int, length: int) -> Cache:
        """Nothing read yet, with room for `length` tokens."""
        return Cache(self.decoder.empty(batch, length))

    def step(self, tokens: jax.Array, index: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits (batch, vocabulary) of what follows `tokens` (batch,) at position `index`."""
        return _step(self.tokens, self.decoder, tokens, index, cache)


def _step(
    embedding: Tokens, stack: Stack, tokens: jax.Array, index: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    length = cache.own[0].keys.shape[1]
    x, cache = stack.step(embedding.at(tokens, index, length), index, cache)
    return embedding.logits(x[:, 0]), cache
