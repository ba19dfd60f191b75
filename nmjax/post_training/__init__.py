"""Prunes a trained network with data instead of training it again."""

from nmjax.post_training.permutation import permute_inputs

__all__ = ["permute_inputs"]
