"""Flax linen modules: training sparse, running packed, folding batch normalization."""

from nmjax.linen.batch_norm import fold_batch_norm as fold_batch_norm
from nmjax.linen.packed_modules import packed_apply as packed_apply
from nmjax.linen.training import cost as cost
from nmjax.linen.training import sparsify as sparsify
