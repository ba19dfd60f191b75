"""Sparse training and packed inference for Flax NNX modules.

`make_plan` plans a module, `sparsify` trains it sparse, `prune` sets its pruned weights to zero,
`pack` returns a module that runs on packed weights, `save` and `load` write and read all variables
of a module, `cost` counts its multiply-adds, and `with_params` trains it with any method of
`nmjax.methods`.
"""

from nmjax.nnx.packed_modules import pack
from nmjax.nnx.plans import cost, make_plan
from nmjax.nnx.training import prune, sparsify, with_params
from nmjax.nnx.variable_files import load, save

__all__ = ["cost", "load", "make_plan", "pack", "prune", "save", "sparsify", "with_params"]
