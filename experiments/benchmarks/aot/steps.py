"""Training steps of whole decoders, compiled for TPU pods: what sparsity adds to the dense step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from experiments.benchmarks import large_model
from experiments.benchmarks.aot import compilers
from experiments.benchmarks.aot.rows import Row
from experiments.benchmarks.aot.statistics import statistics

PATTERNS = ("2:4", "1:4", "4:8")


@dataclass(frozen=True)
class Setting:
    """A model on a pod.

    Args:
      name: of the model, in keys.
      model: sizes.
      topology: of the pod.
      data, model_axis: devices that share the batch, and each layer. Weights at rest are split over
        both, so `model_axis` 1 is fully sharded data parallelism.
      sequences: in a batch.
    """

    name: str
    model: large_model.Decoder
    topology: str
    data: int
    model_axis: int
    sequences: int

    @property
    def key(self) -> str:
        """Model, topology and mesh, such as "7b/v5p:4x4x4/data=8,model=8"."""
        mesh = f"data={self.data},model={self.model_axis}"
        if self.model_axis == 1:
            mesh = f"fsdp={self.data}"
        return f"{self.name}/{self.topology}/{mesh}"


SEVEN = large_model.Decoder()
SEVENTY = large_model.Decoder(layers=80, width=8192, hidden=28672, heads=64, key_heads=8)
SETTINGS = (
    Setting("7b", SEVEN, "v5p:4x4x4", 8, 8, 32),
    Setting("7b", SEVEN, "v5p:4x4x4", 64, 1, 64),
    Setting("70b", SEVENTY, "v5p:16x16x16", 512, 8, 1024),
)
LENGTH = 2048


def rows(layers: int | None = None) -> Iterator[Row]:
    """Dense, STE and SR-STE, with and without remat.

    Args:
      layers: fewer than the models have, for a quick look.
    """
    for setting in SETTINGS:
        if layers is not None:
            setting = replace(setting, model=replace(setting.model, layers=layers))
        for remat in (True, False):
            for pattern, method in _methods():
                name = "dense" if pattern is None else f"{pattern}/{method}"
                saved = "remat" if remat else "no-remat"
                count = "" if layers is None else f"-{layers}-layers"
                key = f"steps{count}/{setting.key}/{saved}/{name}"
                yield Row(key, partial(_row, setting, pattern, method, remat))
        if layers is None:
            key = f"steps-rounding-in-the-loop/{setting.key}/remat/dense"
            yield Row(key, partial(_row, setting, None, "dense", True, once=False))
        yield from _unrolled_rows(setting)


def _unrolled_rows(setting: Setting) -> Iterator[Row]:
    """Two layers without a loop: the compiler counts the bytes of each."""
    short = replace(setting, model=replace(setting.model, layers=2))
    for pattern, method in _methods():
        if method != "ste":
            name = "dense" if pattern is None else f"{pattern}/{method}"
            key = f"steps-2-layers-unrolled/{setting.key}/remat/{name}"
            yield Row(key, partial(_row, short, pattern, method, True, unroll=2))


def _methods() -> Iterator[tuple[str | None, str]]:
    yield None, "dense"
    for pattern in PATTERNS:
        yield pattern, "sr-ste"
    for pattern in PATTERNS:
        yield pattern, "ste"


def _row(
    setting: Setting,
    pattern: str | None,
    method: str,
    remat: bool,
    unroll: int = 1,
    once: bool = True,
) -> dict[str, Any]:
    mesh = compilers.tpu_mesh(setting.topology, data=setting.data, model=setting.model_axis)
    compiled = large_model.compile_step(
        setting.model,
        mesh,
        pattern,
        sequences=setting.sequences,
        length=LENGTH,
        lambda_w=large_model.LAMBDA_W if method == "sr-ste" else 0.0,
        remat=remat,
        unroll=unroll,
        once=once,
    )
    return statistics(compiled)


def beside_dense(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sparse step beside its dense one: what it adds, and ratios.

    Args:
      found: key -> row, of `rows`.
    """
    table = []
    for key, row in found.items():
        here, _, name = key.partition("remat/")
        dense = found.get(f"{here}remat/dense")
        if name in ("", "dense") or dense is None or "refused" in {**row, **dense}:
            continue
        before, after = dense["collectives"], row["collectives"]
        added = {kind: after[kind] - before.get(kind, 0) for kind in after}
        table.append(
            {
                "key": key,
                "collectives_added": {kind: count for kind, count in added.items() if count},
                "copies_added": row["copies"] - dense["copies"],
                "bytes": row["bytes_accessed"] / dense["bytes_accessed"],
                "peak": row["peak"] / dense["peak"],
            }
        )
    return table
