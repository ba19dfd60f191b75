"""Path rules: which one counts, and which are refused."""

import re

import pytest

from nmjax.trees.path_rules import as_rules, check_rules, first_match

NAMES = ["stem/kernel", "block1/conv/kernel", "block2/conv/kernel"]


def test_one_rule_or_several():
    assert as_rules("stem") == ("stem",)
    assert as_rules(["stem", "head"]) == ("stem", "head")
    assert as_rules(()) == ()


@pytest.mark.parametrize("rules", [3, None, re.compile("stem")])
def test_what_is_no_rule(rules):
    with pytest.raises(
        TypeError, match=r"path rules must be a string or a sequence of strings, got"
    ):
        as_rules(rules)


def test_the_first_match_anywhere_in_the_name():
    assert first_match(["conv", "block1"], NAMES[1]) == "conv"
    assert first_match(["^conv", "block1"], NAMES[1]) == "block1"
    assert first_match({"stem": 1}, NAMES[1]) is None


def test_rules_that_match_pass():
    check_rules(["stem", "block[12]/"], NAMES)
    check_rules([], [])


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ("heda", ValueError, "match no leaf: 'heda'(?s:.*)block2/conv/kernel"),
        ("(", ValueError, "is not a regular expression"),
        (3, TypeError, "a path rule must be a string, got 3"),
    ],
)
def test_rules_that_are_refused(rule, error, message):
    with pytest.raises(error, match=message):
        check_rules(["stem", rule], iter(NAMES))
