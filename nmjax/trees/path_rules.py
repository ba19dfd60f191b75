"""Path rules: regular expressions that match anywhere in a leaf's name (`"a/b/kernel"`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

PathRules = str | Sequence[str]


def as_rules(rules: PathRules) -> tuple[str, ...]:
    """Wraps a single rule in a tuple; raises TypeError unless given a rule or a sequence."""
    if isinstance(rules, str):
        return (rules,)
    if not isinstance(rules, Iterable) or isinstance(rules, Mapping):
        raise TypeError(f"path rules must be a string or a sequence of strings, got {rules!r}")
    return tuple(rules)


def first_match(rules: Iterable[str], name: str) -> str | None:
    """The first rule that matches the name, or None.

    >>> first_match(["head", "block[12]/"], "block1/conv/kernel")
    'block[12]/'
    """
    return next((rule for rule in rules if re.search(rule, name)), None)


def check_rules(rules: Iterable[str], names: Iterable[str]) -> None:
    """Rejects rules that match no leaf.

    Raises:
      TypeError: a rule is not a string.
      ValueError: a rule is not a regular expression, or matches no name.
    """
    rules, names = list(rules), list(names)
    for rule in rules:
        _check_rule(rule)
    unused = [rule for rule in rules if not any(re.search(rule, name) for name in names)]
    if unused:
        raise ValueError(
            f"these path rules match no leaf: {', '.join(map(repr, unused))}. The leaves are:\n"
            + "\n".join(f"  {name}" for name in names)
        )


def _check_rule(rule: str) -> None:
    if not isinstance(rule, str):
        raise TypeError(f"a path rule must be a string, got {rule!r}")
    try:
        re.compile(rule)
    except re.error as error:
        raise ValueError(f"the path rule {rule!r} is not a regular expression: {error}") from error
