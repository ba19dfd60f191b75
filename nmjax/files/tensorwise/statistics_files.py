"""Reads statistics of activations from a safetensors file, for weights that are in another file.

The file has a tensor for each planned weight, under the weight's name: the mean square of each
input, (*stack, in), or the Gram matrix X^T X / rows, (*stack, in, in). Inputs are in the order of
the weight's axes, with the taps of a convolution first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.files.tensor_files import open_tensors
from nmjax.plans import LeafPlan, Plan
from nmjax.post_training.collecting import Kind
from nmjax.post_training.matrices import Matrices
from nmjax.post_training.statistics import Statistics

Method = Callable[[Any, Plan, Statistics], Any]


class Calibrated:
    """Prunes one leaf after the other by a method that needs data, with statistics from a file."""

    def __init__(
        self, method: Method, kind: Kind, path: Path, plan: Plan, keys: Mapping[str, str]
    ) -> None:
        """Checks that there is a statistic for each planned leaf, before any work is done.

        Args:
          method: a function (params, plan, statistics) -> params.
          kind: of the statistics that it needs; Gram matrices hold the mean squares too.
          path: of the file.
          plan: from `nmjax.make_plan`.
          keys: leaf name -> the weight's name in the file.

        Raises:
          ValueError: a statistic is missing, or has another size (the message lists all).
        """
        self.method, self.kind = method, kind
        self.file, self.keys = open_tensors(path), keys
        complaints = [self._complaint(name, leaf) for name, leaf in plan.items()]
        if any(complaints):
            raise ValueError(
                f"the statistics in {path} do not fit the checkpoint:\n"
                + "\n".join(filter(None, complaints))
            )

    def __call__(self, name: str, leaf: LeafPlan, w: np.ndarray) -> np.ndarray:
        """The pruned weight."""
        ((_, array),) = self.file.read([self.keys[name]])
        stack, inputs = _sizes(leaf)
        mean = jnp.asarray(array, jnp.float32).reshape(*stack, inputs, -1)
        # A mean square has one number for each input, and a Gram matrix a row.
        mean = mean[..., 0] if mean.shape[-1] == 1 else mean
        statistics = Statistics({name: mean}, {name: jnp.ones(stack, jnp.float32)})
        pruned = self.method({name: jnp.asarray(w)}, Plan(((name, leaf),)), statistics)
        return np.asarray(pruned[name])

    def _complaint(self, name: str, leaf: LeafPlan) -> str:
        found = self.file.tensors.get(self.keys[name])
        *stack, inputs = (*_sizes(leaf)[0][:-1], _sizes(leaf)[1])
        square, gram = (*stack, inputs), (*stack, inputs, inputs)
        wanted = f"{gram}" if self.kind == "gram" else f"{square} or {gram}"
        if found is None:
            return f"  {self.keys[name]}: missing; expected the shape {wanted}"
        allowed = {math.prod(gram)} | ({math.prod(square)} if self.kind != "gram" else set())
        if found.dtype is None or math.prod(found.shape) not in allowed:
            return f"  {self.keys[name]}: has the shape {found.shape}; expected {wanted}"
        return ""


def _sizes(leaf: LeafPlan) -> tuple[tuple[int, ...], int]:
    """The shape of the stack of matrices (one group each), and the number of inputs."""
    view = Matrices(leaf, leaf.shape, groups=1)
    *stack, inputs, _ = jax.eval_shape(view.of, jax.ShapeDtypeStruct(leaf.shape, np.float32)).shape
    return tuple(stack), inputs
