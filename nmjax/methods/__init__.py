"""Methods of sparse training: the contract, one file per method, and schedules."""

from nmjax.methods._cast import CastState, ScaleByAdamSState, cast
from nmjax.methods._decaying_mask import decaying_mask
from nmjax.methods._dense import dense, dense_then
from nmjax.methods._hu_2024 import Hu2024State, hu_2024
from nmjax.methods._lbc import LbcState, LearnCandidatesState, lbc
from nmjax.methods._max_q import max_q
from nmjax.methods._one_shot import OneShotState, one_shot
from nmjax.methods._s_ste import SSteState, s_ste, s_ste_scale
from nmjax.methods._soft_uniform_blocks import SoftBlocksState, soft_uniform_blocks
from nmjax.methods._step import ScaleByStepState, StepState, step
from nmjax.methods._straight_through import straight_through
from nmjax.methods.schedules import cosine_ramp, cubic_ramp, exponential_ramp, linear_ramp
from nmjax.methods.sparsifier import Clock, Method, Sparsifier

__all__ = [
    "CastState",
    "Clock",
    "Hu2024State",
    "LbcState",
    "LearnCandidatesState",
    "Method",
    "OneShotState",
    "SSteState",
    "ScaleByAdamSState",
    "ScaleByStepState",
    "SoftBlocksState",
    "Sparsifier",
    "StepState",
    "cast",
    "cosine_ramp",
    "cubic_ramp",
    "decaying_mask",
    "dense",
    "dense_then",
    "exponential_ramp",
    "hu_2024",
    "lbc",
    "linear_ramp",
    "max_q",
    "one_shot",
    "s_ste",
    "s_ste_scale",
    "soft_uniform_blocks",
    "step",
    "straight_through",
]
