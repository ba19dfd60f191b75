"""Statistics of activations in a safetensors file, for weights that are in another file.

The file has a tensor for each planned weight, under the weight's name: the mean square of each
input, (*stack, in), or the Gram matrix X^T X / rows, (*stack, in, in). Inputs are in the order of
the weight's axes, with the taps of a convolution first. A file that nmjax wrote also says over how
many rows each mean is, so that more data can be added.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.files.file_kinds import check_path
from nmjax.files.tensor_files import NOTE, open_tensors, read_note, write_tensors
from nmjax.plans import LeafPlan, Plan
from nmjax.post_training.collecting import Kind
from nmjax.post_training.matrices import Matrices
from nmjax.post_training.statistics import Statistics

Method = Callable[[Any, Plan, Statistics], Any]

_FORMAT = "statistics"


def save_statistics(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Writes statistics of activations to a safetensors file.

    `nmjax prune --method METHOD --statistics PATH` reads it, for a checkpoint whose weights have
    the same names; and `load_statistics`, to prune in Python or to add more batches.

    Args:
      path: the file, usually `*.safetensors`.
      statistics: from `nmjax.post_training.collect`.

    Raises:
      TypeError: `statistics` are not `Statistics`, or `path` is not a path.
      OSError: the file cannot be written.
      ImportError: safetensors is not installed.
    """
    check_path(path)
    if not isinstance(statistics, Statistics):
        raise TypeError(
            "expected statistics from nmjax.post_training.collect, got "
            f"{type(statistics).__name__}; the call is save_statistics(path, statistics)"
        )
    rows = {name: np.asarray(count).tolist() for name, count in statistics.rows.items()}
    note = json.dumps({"format": _FORMAT, "rows": rows})
    write_tensors(path, {name: np.asarray(x) for name, x in statistics.items()}, {NOTE: note})


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Reads what `save_statistics` wrote.

    Raises:
      ValueError: the file holds something else, or is damaged.
      ImportError: safetensors is not installed.
    """
    check_path(path)
    file = open_tensors(path)
    note = read_note(file.metadata)
    if note.get("format") != _FORMAT:
        raise ValueError(f"{path} does not hold statistics that save_statistics wrote")
    means = {name: jnp.asarray(array) for name, array in file.read(file.tensors)}
    try:
        rows = {name: jnp.asarray(note["rows"][name], jnp.float32) for name in means}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say how many rows each statistic is over") from error
    for name, mean in means.items():
        stack = rows[name].shape
        is_statistic = mean.ndim - len(stack) in (1, 2) and mean.shape[-1] == mean.shape[len(stack)]
        if mean.dtype != jnp.float32 or mean.shape[: len(stack)] != stack or not is_statistic:
            raise ValueError(
                f"{path}: {name} {mean.dtype}{mean.shape} over rows {stack} is not a statistic"
            )
    return Statistics(means, rows)


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
        ((_, array),) = self.file.read([self._key(name)])
        stack, inputs = _sizes(leaf)
        mean = jnp.asarray(array, jnp.float32).reshape(*stack, inputs, -1)
        # A mean square has one number for each input, and a Gram matrix a row.
        mean = mean[..., 0] if mean.shape[-1] == 1 else mean
        statistics = Statistics({name: mean}, {name: jnp.ones(stack, jnp.float32)})
        pruned = self.method({name: jnp.asarray(w)}, Plan(((name, leaf),)), statistics)
        return np.asarray(pruned[name])

    def _key(self, name: str) -> str:
        """The name of a leaf's statistic: that of its weight, or with slashes as in a plan."""
        return self.keys[name] if self.keys[name] in self.file.tensors else name

    def _complaint(self, name: str, leaf: LeafPlan) -> str:
        found = self.file.tensors.get(self._key(name))
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
