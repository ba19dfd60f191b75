"""Path rules: regular expressions, searched for anywhere in a leaf's name (`"a/b/kernel"`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

PathRules = str | Sequence[str]


def as_rules(rules: PathRules) -> tuple[str, ...]:
    """One rule or several, as several.

    Raises:
      TypeError: neither text nor several of anything.
    """
    if isinstance(rules, str):
        return (rules,)
    if not isinstance(rules, Iterable):
        raise TypeError(
            f"path rules are regular expressions as text, one or several, got {rules!r}"
        )
    return tuple(rules)


def first_match(rules: Iterable[str], name: str) -> str | None:
    """The first of the rules that matches the name, or None.

    >>> first_match(["head", "block[12]/"], "block1/conv/kernel")
    'block[12]/'
    """
    return next((rule for rule in rules if re.search(rule, name)), None)


def check_rules(rules: Iterable[str], names: Iterable[str]) -> None:
    """Refuses a rule that nobody heeds.

    Raises:
      TypeError: a rule is not text.
      ValueError: a rule is no regular expression, or matches no name.
    """
    rules, names = list(rules), list(names)
    for rule in rules:
        _check_rule(rule)
    idle = [rule for rule in rules if not any(re.search(rule, name) for name in names)]
    if idle:
        raise ValueError(
            f"these path rules match no leaf: {', '.join(map(repr, idle))}. The leaves are:\n"
            + "\n".join(f"  {name}" for name in names)
        )


def _check_rule(rule: str) -> None:
    if not isinstance(rule, str):
        raise TypeError(f"a path rule is a regular expression as text, got {rule!r}")
    try:
        re.compile(rule)
    except re.error as error:
        raise ValueError(f"the path rule {rule!r} is no regular expression: {error}") from error
