"""The flags of `python -m experiments.train`, and the job they describe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import jax
from jax.sharding import AxisType

import nmjax
from experiments.checkpointing.recovery import distilled, starting_from
from experiments.distributed.placement import Placement, make_placement
from experiments.tasks.options import Options
from experiments.tasks.task import Recipe, Task
from experiments.training.economy import in_auto_axes, with_remat
from experiments.training.finding import default_model, find_task
from experiments.training.job import Job, assemble_job
from experiments.training.methods import check_fits, find_row

_AT_LEAST_ONE = ("accumulate", "checkpoint_every", "keep_checkpoints", "evaluate_every")
_AT_LEAST_ZERO = ("checkpoint_steps", "keep_best", "log_every")
# What errors of nmjax advise: arguments of functions.
_INDIVISIBLE = 'List them in exclude=, or pass on_indivisible="dense" to leave them dense.'
_LAST_SEED = 2**31 - 1  # States hold int32.


@dataclass(frozen=True)
class Flags(Options):
    """Trains a network on a task, dense or sparse from scratch, and saves the run to disk.

    Writes runs/NAME/metrics.jsonl (one line per epoch), settings.json, plan.txt and checkpoints/.
    After Ctrl-C, every finished epoch can be read; --resume continues from the last checkpoint.

    Attributes:
      task: a file in experiments/tasks, such as digits, or PACKAGE.MODULE:FUNCTION for a task of
        your own. The file describes the task and its recipe.
      method: dense, one_shot, ste, sr_ste, sr_ste_decoupled, sr_ste_negative, decaying_mask,
        decaying_mask_scaled, dense_then, max_q, s_ste, step, cast or lbc; for blocks also
        one_by_n, subp_l1 or subp.
      keep_dense: regular expressions for layers that stay dense. None for the task's own, usually
        the first and last layers.
      from_pruned: file with a pruned network to start from: one that --packed wrote, a dense one
        with its variables, or the folder of a checkpoint. The method one_shot then keeps its masks
        from the first step; sr_ste lets them change.
      distill: file with a dense network, of the same kinds, whose outputs the network also learns.
      distill_weight: share of the loss that compares both networks; the rest is the task's own.
      temperature: divides the logits of both networks where they are compared.
      seeds: seeds for the initial weights and the data order. Several train together.
      accumulate: number of parts that a step splits its batch into, to save memory. The parts run
        one after the other and their gradients are averaged; each has its own batch statistics.
      remat: in the backward pass, recompute everything except matrix products and convolutions, to
        save memory.
      devices: number of devices that share each batch. None for all accelerators, or one CPU.
      mesh: axes and sizes, such as data=4,model=2, instead of a number of devices.
      axis_types: type of the mesh's axes.
      layout: how the mesh splits parameters. data: not at all; fsdp: the last axis over the axes
        of the batch; tensor: the last axis over the mesh's last axis. A leaf that does not split
        evenly is replicated; layout.txt in the run's folder shows the result.
      shard: how to split parameters that match a regular expression, REGEX=AXES with one entry per
        trailing axis, such as 'out/kernel=model,*'. The first match wins and overrides --layout.
      batch_axes: axes of the mesh that split each batch. The first axis by default.
      distributed: this is one of several processes, and the cluster (Slurm, Open MPI, Kubernetes,
        TPU) knows the others. JAX_COORDINATOR_ADDRESS in the environment implies it. All processes
        must see the run's folder on a shared disk.
      coordinator: HOST:PORT of process 0, if the cluster does not know it.
      processes: number of processes, with --coordinator.
      process: index of this process, from 0, with --coordinator.
      runs_dir: folder of all runs.
      name: name of this run's folder. None for TASK-MODEL-METHOD-PATTERN.
      resume: continue from the newest checkpoint of this name, if there is one. The result is the
        same as without the interruption.
      checkpoint_every: epochs between checkpoints. The last epoch always has one, and SIGTERM
        writes one immediately.
      checkpoint_steps: optimizer steps between additional checkpoints within epochs; 0 for none.
      keep_checkpoints: how many of the newest checkpoints to keep.
      keep_best: how many of the best checkpoints to keep as well, by the task's first metric on the
        test examples.
      evaluate_every: epochs between evaluations. The last epoch is always evaluated.
      log_every: steps between progress lines within an epoch; 0 for none.
      packed: .safetensors file to write after the last epoch: the network with its sparse leaves
        packed. With --resume, a finished run writes it without training.
    """

    task: str = "digits"
    method: str = "sr_ste"
    keep_dense: tuple[str, ...] | None = None
    from_pruned: Path | None = None
    distill: Path | None = None
    distill_weight: float = 0.5
    temperature: float = 2.0
    seeds: tuple[int, ...] = (0,)
    accumulate: int = 1
    remat: bool = False
    devices: int | None = None
    mesh: str | None = None
    axis_types: Literal["auto", "explicit"] = "auto"
    layout: Literal["data", "fsdp", "tensor"] = "data"
    shard: tuple[str, ...] = ()
    batch_axes: tuple[str, ...] = ()
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    runs_dir: Path = Path("runs")
    name: str | None = None
    resume: bool = False
    checkpoint_every: int = 1
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    keep_best: int = 1
    evaluate_every: int = 1
    log_every: int = 100
    packed: Path | None = None

    def __post_init__(self) -> None:
        """Rejects numbers that make no sense."""
        super().__post_init__()
        self._check(_AT_LEAST_ONE, "at least 1", lambda value: value >= 1)
        self._check(_AT_LEAST_ZERO, "at least 0", lambda value: value >= 0)
        is_distinct = self.seeds and len(set(self.seeds)) == len(self.seeds)
        if not is_distinct or min(self.seeds) < 0 or max(self.seeds) > _LAST_SEED:
            raise ValueError(
                f"seeds must be distinct integers from 0 to 2**31 - 1, got {self.seeds}"
            )
        if self.name:
            parts = PurePath(self.name).parts
            if not parts or ".." in parts or PurePath(self.name).is_absolute():
                raise ValueError(
                    f"name must be a folder within {self.runs_dir}, got {self.name!r}: give "
                    "--runs-dir to write elsewhere"
                )

    @property
    def model_name(self) -> str:
        """The model, or the task's default if none is given."""
        return self.model or default_model(self.task)

    @property
    def folder(self) -> Path:
        """Where this run is kept."""
        if self.name:
            return self.runs_dir / self.name
        parts = (self.task, self.model_name, self.method, self.pattern)
        name = "-".join(part for part in parts if part)
        return self.runs_dir / name.replace(":", "_").replace("/", "_")


def make_job(flags: Flags) -> Job:
    """Makes task, plan and method.

    Raises:
      MissingDatasetError: if the data set has not been prepared.
      ValueError: if a flag has an unsupported value; the message says which.
    """
    check_fits(flags.method, flags.pattern, flags.lambda_w, flags.lambda_decoupled)
    job = assemble_job(make_task(flags), flags.method, flags.pattern, flags.accumulate)
    if flags.from_pruned is None:
        return job
    nmjax.check_sparse(job.task.init(jax.random.key(0))["params"], job.plan)
    return _recovering(flags, job)


def place_job(flags: Flags, job: Job, placement: Placement) -> Job:
    """The job whose plan knows how the parameters lie: TPUs then compute masks shard by shard."""
    if placement.layout is None:
        return job
    task = job.task
    plan = placement.told(jax.eval_shape(task.init, jax.random.key(0))["params"], job.plan)
    method = find_row(flags.method).build(plan, task.recipe, task.steps_per_epoch)
    return _recovering(flags, job._replace(plan=plan, method=method))


def _recovering(flags: Flags, job: Job) -> Job:
    """The job, with the masks of the file if the network is pruned already and they are fixed."""
    if flags.from_pruned is None or flags.method != "one_shot":
        return job
    # Half of the epochs are not dense: the masks are those of the file.
    fixed = nmjax.one_shot(job.plan, at_step=0)
    return job._replace(method=job.method._replace(sparsifier=fixed, restarts=()))


def make_task(flags: Flags) -> Task:
    """Makes the task, with its dense layers and the way it runs changed by the flags."""
    # Flags are Options, so the task reads what it needs from them.
    task = find_task(flags.task)(flags)
    if flags.keep_dense is not None:
        task = dataclasses.replace(task, keep_dense=flags.keep_dense)
    if flags.distill is not None:
        task = distilled(task, flags.distill, flags.distill_weight, flags.temperature)
    if flags.from_pruned is not None:
        task = starting_from(task, flags.from_pruned)
    if flags.remat:
        task = with_remat(task)
    return in_auto_axes(task) if flags.axis_types == "explicit" else task


def make_run_placement(flags: Flags, job: Job) -> Placement:
    """Places the run on devices.

    Raises:
      ValueError: a flag has an unsupported value, or the layout cuts groups or blocks.
    """
    return make_placement(
        jax.eval_shape(job.task.init, jax.random.key(0))["params"],
        job.plan,
        seeds=len(flags.seeds),
        batch_size=job.task.recipe.batch_size,
        devices=flags.devices,
        mesh=flags.mesh,
        axis_type=AxisType.Explicit if flags.axis_types == "explicit" else AxisType.Auto,
        preset=flags.layout,
        rules=flags.shard,
        batch_axes=flags.batch_axes,
        accumulate=flags.accumulate,
    )


def strength(flags: Flags, recipe: Recipe) -> float:
    """The `lambda_w` that the method trains with."""
    return find_row(flags.method).strength(recipe)


def as_flags(
    text: str,
    way_out: str = "Choose another --pattern, or list them in --keep-dense together with the "
    "layers that the task itself keeps dense.",
) -> str:
    """Names flags in an error where nmjax names arguments of functions.

    Args:
      text: of the error.
      way_out: what to do about leaves that a pattern does not divide.
    """
    return text.replace(_INDIVISIBLE, way_out)
