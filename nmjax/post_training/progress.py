"""A line on a terminal that says how far a loop is, and how much time is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")


def tracked(items: Iterable[Item], what: str, *, show: bool | None = None) -> Iterator[Item]:
    """Yields the items, and shows the progress on standard error.

    Args:
      items: what to loop over. Without a length, only the items done are counted.
      what: is being done, for the line.
      show: whether to show it; by default if standard error is a terminal.
    """
    show = sys.stderr.isatty() if show is None else show
    total = len(items) if isinstance(items, Sized) else None
    start = time.monotonic()
    for done, item in enumerate(items):
        if show:
            sys.stderr.write(f"\r{what}: {_line(done, total, time.monotonic() - start)}\033[K")
            sys.stderr.flush()
        yield item
    if show:
        sys.stderr.write(f"\r{what}: done in {time.monotonic() - start:.0f} s\033[K\n")


def _line(done: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{done} done, {seconds:.0f} s"
    left = f", {seconds / done * (total - done):.0f} s left" if done else ""
    return f"{done} of {total}{left}"
