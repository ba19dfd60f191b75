"""Rows of a benchmark that takes long: each is kept when it is done, so a broken run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.json_files import plain, write_json


@dataclass(frozen=True)
class Row:
    """A row and how to find it.

    Args:
      key: path-like, such as "masks/v5e/2:4/float32/-2/apply/nmjax".
      compute: returns the row's numbers.
    """

    key: str
    compute: Callable[[], dict[str, Any]]


def chosen(rows: Iterable[Row], only: Iterable[str]) -> list[Row]:
    """The rows whose keys contain all of the texts."""
    return [row for row in rows if all(text in row.key for text in only)]


def compute(rows: list[Row], folder: Path, *, again: bool = False) -> None:
    """Computes the rows that `folder` does not have, or with `again` all, and prints each.

    What a backend does not have, or a compiler refuses, is kept as the row's "refused".
    """
    for number, row in enumerate(rows, 1):
        file = kept(folder, row.key)
        if file.exists() and not again:
            continue
        start = time.perf_counter()
        try:
            found = row.compute()
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            found = {"refused": str(error).strip().splitlines()[0][:300]}
        took = time.perf_counter() - start
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": row.key, **found, "compiler_seconds": round(took, 1)}
        write_json(file, plain(content), indent=1)
        print(f"[{number}/{len(rows)}] {row.key}: {_short(found)} ({took:.0f} s)", flush=True)


def kept(folder: Path, key: str) -> Path:
    """The file that keeps a row."""
    return folder / (key.replace("/", "__").replace(":", "-") + ".json")


def collect(folder: Path, earlier: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """All rows that a folder keeps, and those of earlier runs that it does not have, by key."""
    kept_here = [json.loads(file.read_text("utf-8")) for file in folder.glob("*.json")]
    rows = {str(row["key"]): row for row in [*earlier, *kept_here]}
    return [rows[key] for key in sorted(rows)]


def _short(found: dict[str, Any]) -> str:
    flat = {name: value for name, value in found.items() if not isinstance(value, list)}
    numbers = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in flat.items()
        if name != "collective_names"
    )
    return ", ".join(numbers)
