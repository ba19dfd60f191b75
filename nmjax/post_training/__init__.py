"""Prunes a trained network with data instead of training it again."""

from nmjax.post_training.permutation import permute_inputs
from nmjax.post_training.statistics import Statistics, collect

__all__ = ["Statistics", "collect", "permute_inputs"]
