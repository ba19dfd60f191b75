"""Every way to prune the encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import nmjax
from experiments.benchmarks.minilm.encoder import Data
from experiments.benchmarks.minilm.recovery import recovered
from experiments.models.text.sentence_encoder import embed
from nmjax import post_training

COMPENSATION = 0.5


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

    def corrected(self, name: str) -> Any:
        """A method, and biases that restore the mean outputs."""
        pruned = self.one_shot(name)
        shifts = post_training.output_shift(
            embed, self.params, pruned, self.data.calibration, self.plan
        )
        biases = {f"{leaf.removesuffix('weight')}bias": x for leaf, x in shifts.items()}
        return pruned | {bias: pruned[bias] + shift for bias, shift in biases.items()}

    def recovered(self, prune: Callable[[], Any]) -> Any:
        """A way to prune, and learning from the dense network afterwards."""
        return recovered(self.params, prune(), self.plan, self.data.calibration)

    def ways(self) -> dict[str, Callable[[], Any]]:
        """Every way to prune, by name."""
        swappable = all(isinstance(leaf.pattern, nmjax.NM) for leaf in self.plan.values())
        names = ["magnitude", "wanda", "ria", "sparse_gpt", "admm", "alps"]
        ways: dict[str, Callable[[], Any]] = {name: partial(self.one_shot, name) for name in names}
        fitted = ("magnitude", "wanda", "sparse_gpt")
        ways |= {f"{name}, bias corrected": partial(self.corrected, name) for name in fitted}
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
