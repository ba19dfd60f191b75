"""MiniLM's sentence encoder, on the parameters of its PyTorch checkpoint as they are.

A BERT encoder with normalization after each sub-layer. A sentence's embedding is the mean over its
tokens, of length 1.

Source: Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
Pre-Trained Transformers", 2020; Reimers and Gurevych, "Sentence-BERT", 2019; Devlin et al., "BERT",
2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]

HEADS = 12
_EPSILON = 1e-12


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Embeds sentences of the same number of tokens, without padding.

    Args:
      params: tensor name -> array, as in the checkpoint: a linear layer's weight is
        (outputs, inputs).
      tokens: integers (sentences, tokens), from the start token to the end token.

    Returns:
      (sentences, width), each of length 1.
    """
    words = params["embeddings.word_embeddings.weight"][tokens]
    places = params["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    # All tokens are of the first of the two sentences that BERT may read.
    kind = params["embeddings.token_type_embeddings.weight"][:1]
    x = _normalized(params, "embeddings.LayerNorm", words + (places + kind)[None])
    for index in range(count_layers(params)):
        x = _layer(params, f"encoder.layer.{index}", x)
    mean = x.mean(axis=1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def count_layers(params: Params) -> int:
    """How many layers the checkpoint has."""
    return 1 + max(int(name.split(".")[2]) for name in params if name.startswith("encoder.layer."))


def _layer(params: Params, name: str, x: jax.Array) -> jax.Array:
    query, key, value = (
        _heads(_linear(params, f"{name}.attention.self.{part}", x))
        for part in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    seen = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value).reshape(x.shape)
    seen = _linear(params, f"{name}.attention.output.dense", seen)
    x = _normalized(params, f"{name}.attention.output.LayerNorm", x + seen)
    hidden = _linear(params, f"{name}.intermediate.dense", x)
    y = _linear(params, f"{name}.output.dense", jax.nn.gelu(hidden, approximate=False))
    return _normalized(params, f"{name}.output.LayerNorm", x + y)


def _heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], HEADS, -1)


def _linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    y = jnp.einsum("...i,oi->...o", x, params[f"{name}.weight"])
    return y + jnp.broadcast_to(params[f"{name}.bias"], y.shape)


def _normalized(params: Params, name: str, x: jax.Array) -> jax.Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    scaled = centered * jax.lax.rsqrt((centered**2).mean(axis=-1, keepdims=True) + _EPSILON)
    scale, shift = (
        jnp.broadcast_to(params[f"{name}.{part}"], x.shape) for part in ("weight", "bias")
    )
    return scaled * scale + shift
