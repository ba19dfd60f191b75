"""Patterns: the structures that a weight can be held to."""

from nmjax.patterns.block1xn import Block1xN as Block1xN
from nmjax.patterns.block1xn import is_blocks as is_blocks
from nmjax.patterns.nm import NM as NM
from nmjax.patterns.pattern import LeafPlan as LeafPlan
from nmjax.patterns.pattern import Pattern as Pattern
from nmjax.patterns.pattern import Whole as Whole
from nmjax.patterns.pattern import parse_pattern as parse_pattern
