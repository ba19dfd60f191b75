"""Methods of sparse training: the contract, schedules, and one file per method."""

from nmjax.methods.from_weights._decaying_mask import decaying_mask
from nmjax.methods.from_weights._dense import dense, dense_then
from nmjax.methods.from_weights._max_q import max_q
from nmjax.methods.from_weights._straight_through import straight_through
from nmjax.methods.products._matmul import training_matmul
from nmjax.methods.products._mvue import mvue_24
from nmjax.methods.schedules import cosine_ramp, cubic_ramp, exponential_ramp, linear_ramp
from nmjax.methods.sparsifier import Clock, Method, Sparsifier
from nmjax.methods.tickets._free_tickets import (
    FreeTicketsState,
    ensemble,
    free_tickets,
    tickets_of,
)
from nmjax.methods.tickets._rates import ticket_rate
from nmjax.methods.tickets._sup_tickets import SupTicketsState, sup_tickets
from nmjax.methods.with_memory._bi_mask import BiMaskState, backward_weights, bi_mask
from nmjax.methods.with_memory._hu_2024 import Hu2024State, hu_2024
from nmjax.methods.with_memory._one_shot import OneShotState, one_shot
from nmjax.methods.with_memory._s_ste import SSteState, s_ste, s_ste_scale
from nmjax.methods.with_memory._soft_uniform_blocks import SoftBlocksState, soft_uniform_blocks
from nmjax.methods.with_optimizer._cast import CastState, ScaleByAdamSState, cast
from nmjax.methods.with_optimizer._lbc import LbcState, LearnCandidatesState, lbc
from nmjax.methods.with_optimizer._step import ScaleByStepState, StepState, step

__all__ = [
    "BiMaskState",
    "CastState",
    "Clock",
    "FreeTicketsState",
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
    "SupTicketsState",
    "backward_weights",
    "bi_mask",
    "cast",
    "cosine_ramp",
    "cubic_ramp",
    "decaying_mask",
    "dense",
    "dense_then",
    "ensemble",
    "exponential_ramp",
    "free_tickets",
    "hu_2024",
    "lbc",
    "linear_ramp",
    "max_q",
    "mvue_24",
    "one_shot",
    "s_ste",
    "s_ste_scale",
    "soft_uniform_blocks",
    "step",
    "straight_through",
    "sup_tickets",
    "ticket_rate",
    "tickets_of",
    "training_matmul",
]
