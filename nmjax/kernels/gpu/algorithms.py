"""Keeps on disk which of cuSPARSELt's kernels was fastest for each product.

There is one JSON file for each kind of GPU, in $NMJAX_CACHE_DIR, or else in $XDG_CACHE_HOME/nmjax
or ~/.cache/nmjax. You can delete it at any time: products then run by cuSPARSELt's first choice
until they are tuned again.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import jax

from nmjax.files.whole_files import write_whole


class Algorithm(NamedTuple):
    """One of cuSPARSELt's kernels.

    Attributes:
      config: its number; negative for cuSPARSELt's first choice.
      split_k: number of parts that the sum is split into.
      split_k_mode: how the parts are added up.
      workspace: bytes that it needs.
    """

    config: int
    split_k: int
    split_k_mode: int
    workspace: int


class Question(NamedTuple):
    """Everything but the GPU that decides which kernel is fastest for a product.

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


# What this process found, by file and question. It counts even if no file can be written.
_found: dict[tuple[Path, str], Algorithm] = {}


def known_algorithm(question: Question) -> Algorithm | None:
    """The fastest kernel for a product, if it has been tuned on this kind of GPU."""
    path = _file()
    if (path, question.key) in _found:
        return _found[path, question.key]
    stored = _known(path).get(question.key)
    return None if stored is None else Algorithm(*stored)


def remember_algorithm(question: Question, algorithm: Algorithm) -> None:
    """Keeps the fastest kernel for a product, in this process and on disk.

    If the file cannot be written, it warns, and later processes search again.
    """
    path = _file()
    _found[path, question.key] = algorithm
    # Keeps what other processes have found meanwhile. If two write at once, one of them wins.
    known = _read(path) | {question.key: list(algorithm)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda draft: draft.write_text(json.dumps(known, indent=1)))
    except OSError as error:
        warnings.warn(
            f"only this process knows the fastest kernel: {path} cannot be written ({error}); "
            "name another folder in NMJAX_CACHE_DIR",
            stacklevel=2,
        )
    _known.cache_clear()


@functools.cache
def _known(path: Path) -> dict[str, list[int]]:
    return _read(path)


def _read(path: Path) -> dict[str, list[int]]:
    """The content of the file; nothing, with a warning, if it is damaged."""
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text())
        if not all(
            len(entry) == 4 and all(type(n) is int for n in entry) for entry in known.values()
        ):
            raise ValueError("an entry is not four integers")
        return dict(known)
    except (ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is damaged and ignored ({error}); the next search replaces it", stacklevel=2
        )
        return {}


def _file() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("NMJAX_CACHE_DIR") or Path(caches) / "nmjax"
    kind = re.sub(r"\W+", "-", jax.devices()[0].device_kind).lower()
    return Path(folder) / f"cusparselt-{kind}.json"
