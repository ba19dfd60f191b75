"""Finds a task by the name that `--task` gives."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

from experiments import tasks
from experiments.tasks.task import Task


def find_task(name: str) -> Callable[..., Task]:
    """The constructor of a task; see `experiments.tasks.options`.

    Args:
      name: of a file in experiments/tasks that defines `task`, or "package.module:function".

    Raises:
      ValueError: there is no such task.
    """
    module, _, function = name.partition(":")
    if not function:
        if name not in task_names():
            raise ValueError(
                f"no task named {name!r}; choose from {', '.join(task_names())}. Name a task of "
                "your own as PACKAGE.MODULE:FUNCTION"
            )
        module, function = f"{tasks.__name__}.{name}", "task"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # The module is there, but a package that it imports is missing.
        raise ValueError(f"task {name!r}: no module named {error.name!r}") from error
    if not hasattr(found, function):
        raise ValueError(f"task {name!r}: {module} has no function {function!r}")
    make: Callable[..., Task] = getattr(found, function)
    return make


def task_names() -> list[str]:
    """The tasks in experiments/tasks.

    Their source is read and not run: importing all of them takes seconds, and needs packages that
    a single task does without.
    """
    (folder,) = map(Path, tasks.__path__)
    return [
        module.name
        for module in pkgutil.iter_modules([str(folder)])
        if not module.ispkg
        and re.search(
            r"^def task\(", (folder / f"{module.name}.py").read_text("utf-8"), re.MULTILINE
        )
    ]


def default_model(name: str) -> str:
    """The model that a task trains where none is named; "" for a task that offers no choice.

    Raises:
      ValueError: there is no such task.
    """
    model: str = getattr(find_task(name), "default_model", "")
    return model
