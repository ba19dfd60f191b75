"""Sparse training and packed inference for unchanged Flax linen modules.

`make_plan` plans a module, `sparsify` trains it sparse in an unchanged loop, `cost` counts its
multiply-adds, `fold_batch_norm` prepares a trained network for serving, and `packed_apply` runs a
module on packed weights.
"""

from nmjax.linen.batch_norm import fold_batch_norm
from nmjax.linen.packed_modules import packed_apply
from nmjax.linen.plans import cost, make_plan
from nmjax.linen.training import sparsify

__all__ = ["cost", "fold_batch_norm", "make_plan", "packed_apply", "sparsify"]
