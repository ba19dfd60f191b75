"""Prunes a trained network with data instead of training it again."""

from nmjax.post_training._admm import admm
from nmjax.post_training._alps import alps
from nmjax.post_training._least_squares import least_squares
from nmjax.post_training._output_shift import output_shift
from nmjax.post_training._prune_with import prune_with
from nmjax.post_training._scores import magnitude, ria, wanda
from nmjax.post_training._sparse_gpt import sparse_gpt
from nmjax.post_training._swaps import improve_by_swaps
from nmjax.post_training.collecting import collect
from nmjax.post_training.ordering.permutation import permute_inputs
from nmjax.post_training.ordering.reordering import reorder_channels
from nmjax.post_training.statistics import Statistics

__all__ = [
    "Statistics",
    "admm",
    "alps",
    "collect",
    "improve_by_swaps",
    "least_squares",
    "magnitude",
    "output_shift",
    "permute_inputs",
    "prune_with",
    "reorder_channels",
    "ria",
    "sparse_gpt",
    "wanda",
]
