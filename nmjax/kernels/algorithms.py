"""Which of cuSPARSELt's kernels was fastest for a product, kept on disk.

One file of JSON for each kind of GPU, in $NMJAX_CACHE_DIR or ~/.cache/nmjax. It can be deleted at
any time: products are then computed by cuSPARSELt's own first choice until they are tuned again.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax


class Algorithm(NamedTuple):
    """One of cuSPARSELt's kernels.

    Attributes:
      config: its number; negative for cuSPARSELt's own first choice.
      split_k: into how many parts the sum is split.
      split_k_mode: how the parts are added up.
      workspace: bytes that it wants.
    """

    config: int
    split_k: int
    split_k_mode: int
    workspace: int


class Question(NamedTuple):
    """Everything about a product that its fastest kernel depends on, but the GPU.

    Attributes:
      version: of cuSPARSELt.
      shape: (batch, rows, columns) of the input and of the matrix.
      transposed: whether the matrix is.
      dtypes: of the operands and of the result.
      bias: whether there is one.
      activation: None or a name.
    """

    version: str
    shape: tuple[int, ...]
    transposed: bool
    dtypes: tuple[str, str]
    bias: bool
    activation: str | None

    @property
    def key(self) -> str:
        """As text."""
        return json.dumps(self)


def known_algorithm(question: Question) -> Algorithm | None:
    """The fastest kernel for a product, if it has been tuned on this kind of GPU."""
    found = _known(_file()).get(question.key)
    return None if found is None else Algorithm(*found)


def remember_algorithm(question: Question, algorithm: Algorithm) -> None:
    """Keeps the fastest kernel for a product, here and on disk.

    Raises:
      OSError: the file cannot be written.
    """
    path = _file()
    known = _known(path)
    known[question.key] = list(algorithm)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known, file, indent=1)
    Path(file.name).replace(path)  # Whole or not at all, also where two processes write.


@functools.cache
def _known(path: Path) -> dict[str, list[int]]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and tune again") from error


def _file() -> Path:
    folder = os.environ.get("NMJAX_CACHE_DIR") or Path.home() / ".cache" / "nmjax"
    kind = re.sub(r"\W+", "-", jax.devices()[0].device_kind).lower()
    return Path(folder) / f"cusparselt-{kind}.json"
