"""nmjax: N:M structured sparsity from scratch in JAX."""

from nmjax.cost import Cost as Cost
from nmjax.cost import cost as cost
from nmjax.masks import nm_mask as nm_mask
from nmjax.metrics import density as density
from nmjax.metrics import flip_rate as flip_rate
from nmjax.metrics import sad as sad
from nmjax.metrics import total_density as total_density
from nmjax.metrics import total_sad as total_sad
from nmjax.patterns import NM as NM
from nmjax.patterns import parse_pattern as parse_pattern
from nmjax.plans import LeafPlan as LeafPlan
from nmjax.plans import Plan as Plan
from nmjax.plans import make_plan as make_plan
from nmjax.scores import magnitude as magnitude
from nmjax.sparsifiers import OneShotState as OneShotState
from nmjax.sparsifiers import Sparsifier as Sparsifier
from nmjax.sparsifiers import dense as dense
from nmjax.sparsifiers import one_shot as one_shot
from nmjax.sparsifiers import straight_through as straight_through
from nmjax.sparsify import compute_masks as compute_masks
from nmjax.sparsify import prune as prune
from nmjax.sparsify import sparsify as sparsify
from nmjax.straight_through import prune_sr_ste as prune_sr_ste
from nmjax.straight_through import prune_ste as prune_ste
from nmjax.transforms import AddSparseRefinedState as AddSparseRefinedState
from nmjax.transforms import add_sparse_refined as add_sparse_refined
