"""Train, prune and pack neural networks with N:M and 1xN block sparsity, in JAX.

The usual path: `make_plan` decides which parameters become sparse, `sparsify` makes them sparse in
the loss, `add_sparse_refined` adds SR-STE's term to an optax chain, and `prune` or `pack` produces
the weights to ship.

`nmjax.linen` and `nmjax.nnx` are for Flax modules. Import them separately; they need Flax.
"""

from nmjax._version import __version__ as __version__
from nmjax.allocation import allocate
from nmjax.analysis.costs import Cost, cost
from nmjax.analysis.sharding import check_sharding, shard_plan
from nmjax.files.packed_files import load_packed, save_packed
from nmjax.kernels.matmul import packed_conv, packed_matmul
from nmjax.kernels.slow_weights import unpack_slow
from nmjax.kernels.states import backends
from nmjax.layouts.axes import Axes
from nmjax.masks.blocks import block_mask
from nmjax.masks.nm import nm_mask
from nmjax.masks.scores import magnitude
from nmjax.masks.transposable import transposable_mask
from nmjax.methods import (
    OneShotState,
    SoftBlocksState,
    Sparsifier,
    cosine_ramp,
    cubic_ramp,
    dense,
    exponential_ramp,
    linear_ramp,
    one_shot,
    soft_uniform_blocks,
    straight_through,
)
from nmjax.metrics import (
    RowBalance,
    blocks_per_row,
    blocks_regrown,
    density,
    flip_rate,
    row_balance,
    sad,
    total_density,
    total_sad,
)
from nmjax.packed.blocks import PackedBlocks
from nmjax.packed.nm import PackedNM
from nmjax.packed.packing import check_sparse, pack, unpack
from nmjax.packed.quantized import Quantized
from nmjax.packed.quantizing import quantize
from nmjax.packed.storage import LeafSize, Sizes, sizes
from nmjax.packed.tiled import TiledNM, for_platform
from nmjax.patterns import NM, Block1xN, parse_pattern
from nmjax.planning import check_axes, make_plan
from nmjax.plans import LeafPlan, Plan
from nmjax.pruning import compute_masks, prune, sparsify
from nmjax.ste import prune_sr_ste, prune_ste
from nmjax.tracing.channel_order import Channels, l1_order, permute_channels, sort_channels
from nmjax.tracing.channels import find_channels
from nmjax.transforms import AddSparseRefinedState, add_sparse_refined

__all__ = [
    "NM",
    "AddSparseRefinedState",
    "Axes",
    "Block1xN",
    "Channels",
    "Cost",
    "LeafPlan",
    "LeafSize",
    "OneShotState",
    "PackedBlocks",
    "PackedNM",
    "Plan",
    "Quantized",
    "RowBalance",
    "Sizes",
    "SoftBlocksState",
    "Sparsifier",
    "TiledNM",
    "add_sparse_refined",
    "allocate",
    "backends",
    "block_mask",
    "blocks_per_row",
    "blocks_regrown",
    "check_axes",
    "check_sharding",
    "check_sparse",
    "compute_masks",
    "cosine_ramp",
    "cost",
    "cubic_ramp",
    "dense",
    "density",
    "exponential_ramp",
    "find_channels",
    "flip_rate",
    "for_platform",
    "l1_order",
    "linear_ramp",
    "load_packed",
    "magnitude",
    "make_plan",
    "nm_mask",
    "one_shot",
    "pack",
    "packed_conv",
    "packed_matmul",
    "parse_pattern",
    "permute_channels",
    "prune",
    "prune_sr_ste",
    "prune_ste",
    "quantize",
    "row_balance",
    "sad",
    "save_packed",
    "shard_plan",
    "sizes",
    "soft_uniform_blocks",
    "sort_channels",
    "sparsify",
    "straight_through",
    "total_density",
    "total_sad",
    "transposable_mask",
    "unpack",
    "unpack_slow",
]
