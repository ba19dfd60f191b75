"""What orbax prints about errors that it raises as well: held back, so that one line says it.

Of an array that cannot be written or read it logs the traceback in each thread that the error
passes, and closes an event loop for which tensorstore is still at work on other arrays.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

# Where it logs errors that `CheckpointManager.wait_until_finished` or the next `save` raises.
_RAISED_TOO = {
    ("future.py", "run"),
    ("async_checkpointer.py", "_thread_func"),
    ("checkpoint_manager.py", "wait_until_finished"),
}


def hold_back() -> None:
    """Holds it back from now on, and nothing else; a second call changes nothing."""
    logging.getLogger("absl").addFilter(_is_news)
    tell = sys.unraisablehook
    if not (isinstance(tell, partial) and tell.func is _tell_news):
        sys.unraisablehook = partial(_tell_news, tell)


def _is_news(record: logging.LogRecord) -> bool:
    is_raised = (record.filename, record.funcName) in _RAISED_TOO and "orbax" in record.pathname
    return not (is_raised and record.exc_info)


def _tell_news(tell: Callable[[Any], None], error: Any) -> None:
    """Tells of an error that nobody can catch, unless it is that of the closed event loop."""
    # From tensorstore's threads: of no Python object.
    if error.object is not None or str(error.exc_value) != "Event loop is closed":
        tell(error)
