"""English sentences that are present wherever Python is, for calibrating a sentence encoder.

Docstrings of Python's own library give text of one kind. Descriptions and licenses of installed
packages give text of another.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from experiments.data.library_sources import is_test, library_files

# Plain prose: no code, no addresses, no tables.
_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()-]+[.!?]")
_END = re.compile(r"(?<=[.!?]) +(?=[A-Z])")


def sentences_of(text: str) -> list[str]:
    """The sentences of a text that are plain prose.

    >>> sentences_of("Return the sum. See x[0] == y. It is exact!")
    ['Return the sum.', 'It is exact!']
    """
    parts = _END.split(" ".join(text.split()))
    return [part for part in parts if _SENTENCE.fullmatch(part)]


def docstring_sentences(folder: Path | None = None) -> tuple[list[str], list[str]]:
    """Sentences of the library's docstrings, in two halves that share no file and no sentence.

    Args:
      folder: of the library; None for that of the running Python.

    Returns:
      Sentences to calibrate with, and those of held-out files.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    halves: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for path in library_files(root):
        half = halves[is_test(path.relative_to(root).as_posix())]
        half |= dict.fromkeys(s for text in _docstrings(path) for s in sentences_of(text))
    held_out = [sentence for sentence in halves[True] if sentence not in halves[False]]
    return list(halves[False]), held_out


def package_sentences() -> list[str]:
    """Sentences of the descriptions and licenses of installed packages, each once."""
    found: dict[str, None] = {}
    for package in sorted(distributions(), key=lambda package: str(package.name)):
        texts = [str(package.metadata["Description"] or ""), *_licenses(package)]
        found |= dict.fromkeys(s for text in texts for s in sentences_of(text))
    return list(found)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # Some files are examples of what is wrong.
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def _licenses(package: Distribution) -> Iterator[str]:
    for file in package.files or []:
        if re.match(r"(licen[sc]e|copying|notice)", file.name, re.IGNORECASE):
            path = Path(str(file.locate()))
            if path.is_file():
                yield path.read_text(encoding="utf-8", errors="replace")
