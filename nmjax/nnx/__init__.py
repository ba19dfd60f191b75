"""Flax NNX modules: plans whose axes are read off the module's program."""

from nmjax.nnx.plans import make_plan

__all__ = ["make_plan"]
