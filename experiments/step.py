"""The functions that a training run is made of: start, step, evaluate, and what masks did.

Each is written for one state and jitted once; several seeds share them by a leading axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nmjax
from experiments.methods import Method, optimizer
from experiments.seeds import OverSeeds
from experiments.tasks.task import Batch, Sums, Task
from nmjax.sparsify import Masks
from nmjax.trees import named_leaves


class TrainState(NamedTuple):
    """What a training step reads and writes.

    Attributes:
      params: the dense parameters.
      collections: Flax's other collections, such as "batch_stats".
      opt_state: of the optimizer.
      sparse: of the sparsifier.
      lambda_w: float32 scalar, strength of the sparse-refined term.
      seed: int32 scalar; with `step` it determines every random number.
      step: int32 scalar, optimizer steps done.
      loss_sum: float32 scalar, sum of the losses of this epoch.
      bad_step: int32 scalar, the first step whose loss was not finite; -1 if none.
    """

    params: Any
    collections: Any
    opt_state: Any
    sparse: Any
    lambda_w: jax.Array
    seed: jax.Array
    step: jax.Array
    loss_sum: jax.Array
    bad_step: jax.Array


class Topology(NamedTuple):
    """Earlier masks, to compare with. A mask is what magnitude pruning would keep at a moment.

    Attributes:
      first: masks of the initial weights.
      epoch: masks at the end of the previous epoch.
      step: masks before the step that is being watched.
      flips: float32 scalar, sum of the flip rates watched in this epoch.
      watched: int32 scalar, how many steps that are.
    """

    first: Masks
    epoch: Masks
    step: Masks
    flips: jax.Array
    watched: jax.Array


class RunState(NamedTuple):
    """Everything that a checkpoint must hold: a pytree of arrays.

    With several seeds every array has a leading axis for them.
    """

    train: TrainState
    topology: Topology

    def epochs_done(self, steps_per_epoch: int) -> int:
        """How many epochs lie behind this state."""
        return int(np.ravel(self.train.step)[0]) // steps_per_epoch


class Programs(NamedTuple):
    """The jitted functions of one task, plan and method.

    Attributes:
      start: (seed, lambda_w) -> RunState.
      refresh: TrainState -> TrainState, the sparsifier's, between epochs.
      step: (TrainState, batch) -> TrainState. Gives up its argument's memory.
      evaluate: (TrainState, batch) -> sums.
      watch: (Topology, params) -> Topology, before a step whose flips are to be counted.
      count: (Topology, params) -> Topology, after it.
      close: RunState -> (RunState, measurements), at the end of an epoch.
      seeds: whether the functions take a leading axis of seeds.
    """

    start: Callable[..., RunState]
    refresh: Callable[..., TrainState]
    step: Callable[..., TrainState]
    evaluate: Callable[..., Sums]
    watch: Callable[..., Topology]
    count: Callable[..., Topology]
    close: Callable[..., tuple[RunState, dict[str, Any]]]
    seeds: bool


class Job(NamedTuple):
    """What is trained and how.

    Attributes:
      task: data, model, loss, metric, recipe.
      plan: which leaves are sparse; for dense training: whose topology is watched.
      method: from `experiments.methods`.
    """

    task: Task
    plan: nmjax.Plan
    method: Method


def plan_of(task: Task, pattern: str) -> nmjax.Plan:
    """The plan of a task's model at a pattern, with the task's dense layers left dense."""
    variables = jax.eval_shape(task.init, jax.random.key(0))
    return nmjax.make_plan(variables["params"], pattern, exclude=task.keep_dense)


def make_programs(job: Job, *, over_seeds: OverSeeds | None = None) -> Programs:
    """Jits the functions of a run.

    Args:
      job: task, plan and method.
      over_seeds: None for a single state; otherwise what makes a function of one state a function
        of many, such as `jax.vmap` or `experiments.seeds.fastest(...)`.
    """
    lift: OverSeeds = over_seeds or (lambda function: function)
    return Programs(
        start=jax.jit(lift(partial(_start, job))),
        refresh=jax.jit(lift(partial(_refresh, job))),
        step=jax.jit(lift(partial(_step, job)), donate_argnums=0),
        evaluate=jax.jit(lift(partial(_evaluate, job))),
        watch=jax.jit(lift(partial(_watch, job))),
        count=jax.jit(lift(partial(_count, job))),
        close=jax.jit(lift(partial(_close, job))),
        seeds=over_seeds is not None,
    )


def _optimizer(job: Job, lambda_w: jax.Array) -> optax.GradientTransformationExtraArgs:
    return optimizer(job.method, job.task.recipe, job.task.steps_per_epoch, lambda_w)


def _start(job: Job, seed: jax.Array, lambda_w: jax.Array) -> RunState:
    init_key, sparse_key = jax.random.split(jax.random.key(seed))
    variables = dict(job.task.init(init_key))
    params = variables.pop("params")
    masks = nmjax.compute_masks(params, job.plan)
    train = TrainState(
        params=params,
        collections=variables,
        opt_state=_optimizer(job, lambda_w).init(params),
        sparse=job.method.sparsifier.init(params, sparse_key),
        lambda_w=lambda_w,
        seed=seed,
        step=jnp.int32(0),
        loss_sum=jnp.float32(0),
        bad_step=jnp.int32(-1),
    )
    return RunState(train, Topology(masks, masks, masks, jnp.float32(0), jnp.int32(0)))


def _refresh(job: Job, state: TrainState) -> TrainState:
    sparse = job.method.sparsifier.refresh(state.sparse, state.params, state.step)
    return state._replace(sparse=sparse)


def _step(job: Job, state: TrainState, batch: Batch) -> TrainState:
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        sparse = job.method.sparsifier.apply(params, state.sparse)
        return job.task.loss(sparse, state.collections, batch, key)

    (loss, collections), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    tx = _optimizer(job, state.lambda_w)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    is_first_bad = ~jnp.isfinite(loss) & (state.bad_step < 0)
    return state._replace(
        params=optax.apply_updates(state.params, updates),
        collections=collections,
        opt_state=opt_state,
        step=state.step + 1,
        loss_sum=state.loss_sum + loss.astype(jnp.float32),
        bad_step=jnp.where(is_first_bad, state.step, state.bad_step),
    )


def _evaluate(job: Job, state: TrainState, batch: Batch) -> Sums:
    sparse = job.method.sparsifier.apply(state.params, state.sparse)
    return job.task.evaluate(sparse, state.collections, batch)


def _watch(job: Job, topology: Topology, params: Any) -> Topology:
    return topology._replace(step=nmjax.compute_masks(params, job.plan))


def _count(job: Job, topology: Topology, params: Any) -> Topology:
    flips = nmjax.flip_rate(topology.step, nmjax.compute_masks(params, job.plan))
    return topology._replace(flips=topology.flips + flips, watched=topology.watched + 1)


def _close(job: Job, state: RunState) -> tuple[RunState, dict[str, Any]]:
    train, topology = state
    masks = nmjax.compute_masks(train.params, job.plan)
    forward = named_leaves(job.method.sparsifier.apply(train.params, train.sparse))
    measured = {
        "train_loss": train.loss_sum / job.task.steps_per_epoch,
        "bad_step": train.bad_step,
        "sad_first": nmjax.sad(topology.first, masks),
        "sad_epoch": nmjax.total_sad(topology.epoch, masks),
        "flip_rate": topology.flips / jnp.maximum(topology.watched, 1),
        "density": nmjax.total_density({name: forward[name] != 0 for name in job.plan}),
    }
    train = train._replace(loss_sum=jnp.float32(0))
    topology = topology._replace(epoch=masks, flips=jnp.float32(0), watched=jnp.int32(0))
    return RunState(train, topology), measured
