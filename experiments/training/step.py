"""The functions that a training run consists of: begin, step, evaluate, measure the masks.

Each is written for one state and jitted once. Several seeds share them through a leading axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import nmjax
from experiments.distributed.layout import Layout
from experiments.distributed.seeds import OverSeeds
from experiments.tasks.task import Batch, Sums, Task, Variables
from experiments.training.finite import first_bad_leaf
from experiments.training.job import Job as Job
from experiments.training.job import check_plan
from experiments.training.job import plan_of as plan_of
from experiments.training.methods import Method, Strengths, is_blocks, optimizer
from experiments.training.rearranging import free_channels, sort_network
from nmjax.pruning import Masks
from nmjax.trees.leaves import named_leaves

Measured = dict[str, Any]
# The number: parts that a batch is split into, see `Job.accumulate`.
Training = tuple[Task, Method, int]


class TrainState(NamedTuple):
    """What a training step reads and writes.

    Attributes:
      params: the dense parameters.
      collections: Flax's other collections, such as "batch_stats".
      opt_state: of the optimizer.
      sparse: of the sparsifier.
      lambda_w: float32 scalar, strength of the sparse-refined term; or `Strengths` of scalars.
      seed: int32 scalar; with `step` it determines every random number.
      step: int32 scalar, optimizer steps done.
      loss_sum: float32 scalar, sum of the losses of this epoch.
      bad_step: int32 scalar, the first step whose loss was not finite; -1 if none.
    """

    params: Any
    collections: Any
    opt_state: Any
    sparse: Any
    lambda_w: jax.Array | Strengths
    seed: jax.Array
    step: jax.Array
    loss_sum: jax.Array
    bad_step: jax.Array


class Topology(NamedTuple):
    """Earlier masks to compare with: what magnitude pruning would have kept then.

    Attributes:
      first: masks of the initial weights.
      epoch: masks at the end of the previous epoch.
      flips: float32 scalar, sum of the flip rates watched in this epoch.
      watched: int32 scalar, number of steps that `flips` sums over.
      used: masks of 1xN blocks that the method itself remembered at the end of the previous
        epoch; empty for other patterns, and for methods that remember none.
    """

    first: Masks
    epoch: Masks
    flips: jax.Array
    watched: jax.Array
    used: Masks


class RunState(NamedTuple):
    """Everything that a checkpoint must hold: a pytree of arrays.

    With several seeds every array has a leading axis for them.
    """

    train: TrainState
    topology: Topology

    def steps_done(self) -> int:
        """Number of optimizer steps taken so far."""
        # All seeds take their steps together.
        return int(np.ravel(jax.device_get(self.train.step))[0])


class Programs(NamedTuple):
    """The jitted functions of one task, plan and method.

    Attributes:
      init: seed -> the model's variables.
      begin: (variables, seed, lambda_w) -> TrainState.
      rearrange: RunState -> RunState with the network's channels sorted by size; None for methods
        that do not sort them.
      refresh: TrainState -> TrainState, the sparsifier's, between steps.
      step: (TrainState, batch) -> TrainState. Donates its first argument. It refreshes first if
        the method does so at every step.
      forward: TrainState -> the parameters of the forward pass.
      evaluate: (those parameters, collections, batch) -> sums.
      predict: (the same) -> (the arrays of the batch that scores need, predictions), both whole on
        every device; None for a task without predictions.
      masks: params -> masks.
      remember: (TrainState, masks of the initial weights) -> Topology.
      count_flips: (Topology, masks before a step, masks after it) -> Topology.
      bad: TrainState -> (its `bad_step`, `first_bad_leaf` of its variables).
      close: (RunState, masks, parameters of the forward pass) -> (RunState, measurements), at the
        end of an epoch.
      seeds: whether the functions take a leading axis of seeds.
    """

    init: Callable[..., Any]
    begin: Callable[..., TrainState]
    rearrange: Callable[..., RunState] | None
    refresh: Callable[..., TrainState]
    step: Callable[..., TrainState]
    forward: Callable[..., Any]
    evaluate: Callable[..., Sums]
    predict: Callable[..., Any] | None
    masks: Callable[..., Masks]
    remember: Callable[..., Topology]
    count_flips: Callable[..., Topology]
    bad: Callable[..., tuple[jax.Array, jax.Array]]
    close: Callable[..., tuple[RunState, Measured]]
    seeds: bool


def make_programs(
    job: Job, *, over_seeds: OverSeeds | None = None, layout: Layout | None = None
) -> Programs:
    """Jits the functions of a run.

    A function that depends only on the task, plan or method is shared, with its compilation, with
    programs made earlier for the same one and the same `over_seeds` and `layout`.

    Args:
      job: task, plan and method.
      over_seeds: None for a single state; otherwise turns a function of one state into one of many,
        such as `jax.vmap` or `experiments.distributed.seeds.fastest(...)`.
      layout: where to place results; None for the default device.

    Raises:
      ValueError: the plan's axes are not those that the task's network sums over.
    """
    task, plan, method, accumulate = job
    check_plan(task, plan)
    training = (task, method, accumulate)
    jit = partial(_jit, over_seeds, layout)
    is_explicit = layout is not None and layout.is_explicit
    return Programs(
        init=jit(_init, task),
        begin=jit(_begin, training),
        rearrange=None
        if method.rearranges_at is None
        else jit(_rearrange, (free_channels(job), is_explicit)),
        refresh=jit(_refresh, method),
        step=jit(_step, training, donate=0),
        forward=jit(_forward, method),
        evaluate=jit(_evaluate, task),
        predict=None if task.predict is None else jit(_predict, task),
        masks=jit(_masks, plan),
        remember=jit(_remember, job),
        count_flips=jit(_count_flips, plan),
        bad=jit(_bad, None),
        close=jit(_close, job),
        seeds=over_seeds is not None,
    )


@lru_cache(maxsize=256)
def _jit(
    over_seeds: OverSeeds | None,
    layout: Layout | None,
    function: Callable[..., Any],
    fixed: Any,
    *,
    donate: int | None = None,
) -> Callable[..., Any]:
    """Jits `function` with its first argument fixed; equal arguments share one compilation."""

    @wraps(function)
    def one(*args: Any) -> Any:
        return function(fixed, *args)

    many = one if over_seeds is None else over_seeds(one)

    @wraps(function)
    def placed(*args: Any) -> Any:
        return many(*args) if layout is None else layout.constrain(many(*args))

    # Constrained inside of jit: a result placed afterwards would be copied once more.
    return jax.jit(placed, donate_argnums=donate)


def _init(task: Task, seed: jax.Array) -> Variables:
    return dict(task.init(jax.random.fold_in(jax.random.key(seed), 0)))


def _begin(
    training: Training, variables: Variables, seed: jax.Array, lambda_w: jax.Array | Strengths
) -> TrainState:
    _, method, _ = training
    params = variables["params"]
    # 0 made the weights and steps use 2 and up, so no random number is used twice.
    sparse_key = jax.random.fold_in(jax.random.key(seed), 1)
    return TrainState(
        params=params,
        collections={name: value for name, value in variables.items() if name != "params"},
        opt_state=_optimizer(training, lambda_w).init(params),
        sparse=method.sparsifier.init(params, sparse_key),
        lambda_w=lambda_w,
        seed=seed,
        step=jnp.int32(0),
        loss_sum=jnp.float32(0),
        bad_step=jnp.int32(-1),
    )


def _rearrange(fixed: tuple[tuple[nmjax.Channels, ...], bool], state: RunState) -> RunState:
    """Runs before a sparsifier chooses masks: those that it remembers already are not sorted.

    Earlier masks move with their weights. Blocks now hold other channels, though, so the masks of
    this epoch differ from them by more than what training changed.
    """
    (channels, is_explicit), (train, topology) = fixed, state
    sort = partial(sort_network, channels)
    if is_explicit:
        # JAX does not sort along an Explicit axis that is split. This happens once, so everything
        # may be whole on every device until the layout splits it again.
        sort = jax.sharding.auto_axes(sort, out_sharding=PartitionSpec())
    variables, opt_state, (first, epoch) = sort(
        {"params": train.params, **train.collections},
        train.opt_state,
        (topology.first, topology.epoch),
    )
    params = variables.pop("params")
    return RunState(
        train._replace(params=params, collections=variables, opt_state=opt_state),
        topology._replace(first=first, epoch=epoch),
    )


def _refresh(method: Method, state: TrainState) -> TrainState:
    sparse = method.sparsifier.refresh(state.sparse, state.params, state.step)
    return state._replace(sparse=sparse)


def _step(training: Training, state: TrainState, batch: Batch) -> TrainState:
    task, method, parts = training
    if method.refresh_every == 1:
        # Here it shares one launch and its intermediate results with the step.
        state = _refresh(method, state)
    # From seed and step alone: a resumed run draws the same numbers.
    key = jax.random.fold_in(jax.random.key(state.seed), state.step + 2)
    tx = _optimizer(training, state.lambda_w)
    # None: transformations that need masks compute them from the weights.
    masks = None if method.masks is None else method.masks(state.sparse)

    def learn(kept: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, jax.Array]:
        params, collections, opt_state = kept

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            sparse = method.sparsifier.apply(params, state.sparse)
            return task.loss(sparse, collections, *part)

        (loss, collections), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, masks=masks)
        return (optax.apply_updates(params, updates), collections, opt_state), loss

    kept = state.params, state.collections, state.opt_state
    if parts == 1:
        kept, loss = learn(kept, (batch, key))
    else:
        kept, losses = jax.lax.scan(
            learn, kept, (_deal(batch, parts), jax.random.split(key, parts))
        )
        loss = losses.mean()
    params, collections, opt_state = kept
    sparse_state = method.follow(state.sparse, opt_state)
    # Noted on the device and read at the end of the epoch, so that no step has to wait.
    is_first_bad = ~jnp.isfinite(loss) & (state.bad_step < 0)
    return state._replace(
        params=params,
        collections=collections,
        opt_state=opt_state,
        sparse=sparse_state,
        step=state.step + 1,
        loss_sum=state.loss_sum + loss.astype(jnp.float32),
        bad_step=jnp.where(is_first_bad, state.step, state.bad_step),
    )


def _deal(batch: Batch, parts: int) -> Batch:
    """Deals the examples out like cards, so that each device keeps its own: (parts, ...)."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(len(x) // parts, parts, *x.shape[1:]), 0, 1), batch
    )


def _optimizer(
    training: Training, lambda_w: jax.Array | Strengths
) -> optax.GradientTransformationExtraArgs:
    task, method, parts = training
    tx = optimizer(method, task.recipe, task.steps_per_epoch, lambda_w)
    if parts == 1:
        return tx
    # It averages the gradients of all parts and calls `tx` once, so the sparse-refined term is
    # added once a step.
    steps = optax.MultiSteps(tx, parts)
    # Not `steps.gradient_transformation()`, which does not pass masks on.
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def _forward(method: Method, state: TrainState) -> Any:
    return method.sparsifier.apply(state.params, state.sparse)


def _evaluate(task: Task, params: Any, collections: Variables, batch: Batch) -> Sums:
    return task.evaluate(params, collections, batch)


def _predict(task: Task, params: Any, collections: Variables, batch: Batch) -> tuple[Batch, Any]:
    if task.predict is None:
        raise TypeError(f"task {task.name} predicts nothing")
    # Each process has read only its own rows, but scores all of them, so they travel together.
    needed = {name: batch[name] for name in ("valid", *task.scored_by) if name in batch}
    return needed, task.predict(params, collections, batch)


def _masks(plan: nmjax.Plan, params: Any) -> Masks:
    return nmjax.compute_masks(params, plan)


def _remember(job: Job, state: TrainState, first: Masks) -> Topology:
    return Topology(first, first, jnp.float32(0), jnp.int32(0), _used(job, state))


def _used(job: Job, state: TrainState) -> Masks:
    """The masks of blocks that a method remembers; none for other patterns."""
    if job.method.masks is None or not all(is_blocks(leaf.pattern) for leaf in job.plan.values()):
        return {}
    # Copies, because the next step donates the state's own.
    return {name: jnp.copy(mask) for name, mask in job.method.masks(state.sparse).items()}


def _count_flips(plan: nmjax.Plan, topology: Topology, before: Masks, after: Masks) -> Topology:
    del plan
    flips = topology.flips + nmjax.flip_rate(before, after)
    return topology._replace(flips=flips, watched=topology.watched + 1)


def _bad(fixed: None, state: TrainState) -> tuple[jax.Array, jax.Array]:
    del fixed
    return state.bad_step, first_bad_leaf(state.params, state.collections)


def _close(job: Job, state: RunState, masks: Masks, forward: Any) -> tuple[RunState, Measured]:
    train, topology = state
    leaves = named_leaves(forward)
    measured = {
        "train_loss": train.loss_sum / job.task.steps_per_epoch,
        "bad_step": train.bad_step,
        "bad_leaf": first_bad_leaf(train.params, train.collections),
        "sad_first": nmjax.sad(topology.first, masks),
        "sad_epoch": nmjax.total_sad(topology.epoch, masks),
        "flip_rate": topology.flips / jnp.maximum(topology.watched, 1),
        "density": nmjax.total_density({name: leaves[name] != 0 for name in job.plan}),
    }
    used = _used(job, train)
    measured["blocks"] = _block_changes(job.plan, topology.used, used) if used else {}
    # `bad_step` is not reset: it stays the first of the run.
    train = train._replace(loss_sum=jnp.float32(0))
    topology = topology._replace(epoch=masks, flips=jnp.float32(0), watched=jnp.int32(0), used=used)
    return RunState(train, topology), measured


def _block_changes(plan: nmjax.Plan, before: Masks, after: Masks) -> Measured:
    """Mask entries that differ, blocks that returned, and blocks kept now in each row."""
    return {
        "sad": nmjax.total_sad(before, after),
        "regrown": sum(nmjax.blocks_regrown(before, after, plan).values()),
        "kept_rows": nmjax.blocks_per_row(after, plan),
    }
