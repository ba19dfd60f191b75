"""Checks the shapes in the library's signatures, in the tests only.

The library imports jaxtyping for type checkers alone (`if TYPE_CHECKING:`), so users never load it.
Here an import hook gives the checked modules those names, and jaxtyping's own hook decorates their
functions.
"""

import ast
import importlib.abc
import sys
import typing
from pathlib import Path
from typing import Any

import beartype
import jaxtyping

CHECKED = ("nmjax.masks", "nmjax.metrics", "nmjax.ste")


def install():
    """Must run before the first import of the library."""
    early = [name for name in sys.modules if name.startswith(CHECKED)]
    if early:
        raise RuntimeError(f"imported before the hook was there: {early}")
    decorating = jaxtyping.install_import_hook(CHECKED, "tests.shape_checks.check_after_call")
    sys.meta_path.insert(0, _Finder(decorating.hook))


def check_after_call(function):
    """Checks arguments and result once a call has returned.

    So the library's own errors come first, and their tests see what users see. jaxtyping passes two
    functions: one checks the arguments before the call and returns Any; the other checks arguments
    and result after it.
    """
    hints = function.__annotations__
    if hints.get("return") is Any or not any(map(_has_shape, hints.values())):
        return function
    return _checked(function)


# As in type checkers, an int will do where a float is wanted.
_checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def _has_shape(hint):
    is_array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(map(_has_shape, typing.get_args(hint)))


class _Finder(importlib.abc.MetaPathFinder):
    """Adds the names under `if TYPE_CHECKING:` to the modules that jaxtyping's finder finds."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        spec = self.finder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                vars(module).update(_names_for_type_checkers(Path(module.__file__).read_text()))
                execute(module)

            spec.loader.exec_module = exec_module
        return spec


def _names_for_type_checkers(source):
    names = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), "<TYPE_CHECKING>", "exec"), names)
    return {name: value for name, value in names.items() if name != "__builtins__"}
