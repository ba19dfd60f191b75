"""The flags of `python -m experiments.train`, and the job they describe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from experiments.distributed.placement import Placement, make_placement
from experiments.tasks.task import Recipe, Task
from experiments.training.economy import in_auto_axes, in_bfloat16, with_remat
from experiments.training.methods import check_fits, find_row, is_blocks
from experiments.training.step import Job, plan_of

DEFAULT_MODELS = {
    "digits": "small_resnet",
    "cifar10": "resnet18",
    "imagenet2012": "resnet50",
    "number_names": "transformer_tiny",
    "wmt14": "transformer_base",
    "python_bytes": "decoder_tiny",
    "flow": "raft_tiny",
    "flying_chairs": "raft",
    "sintel": "raft",
    "detection": "mask_rcnn_tiny",
    "coco": "faster_rcnn",
}
# Of tasks whose other models are not those of any other task.
_OTHER_MODELS = {"coco": ("mask_rcnn",)}
TaskName = Literal[
    "digits",
    "cifar10",
    "imagenet2012",
    "number_names",
    "wmt14",
    "python_bytes",
    "flow",
    "flying_chairs",
    "sintel",
    "detection",
    "coco",
]


@dataclass(frozen=True)
class Flags:
    """Trains a network on a task, dense or sparse from scratch, and keeps the run on disk.

    Writes runs/NAME/metrics.jsonl (one line an epoch), settings.json, plan.txt and checkpoints/.
    Ctrl-C leaves every finished epoch readable; --resume goes on from the last checkpoint.

    Attributes:
      task: what to train on. The digits ship with scikit-learn, the number names with num2words,
        the bytes with Python; flow and detection are generated. flying_chairs and sintel are read
        from the folders that they are unpacked to, the others from tensorflow-datasets in
        array_record format.
      model: None for the task's: small_resnet for digits, resnet18 for cifar10, resnet50 for
        imagenet2012, transformer_tiny for number_names, transformer_base for wmt14, decoder_tiny
        for python_bytes. Also resnet8, resnet20, resnet34, resnet101, mobilenet_v1;
        transformer_big; decoder_small, decoder_medium. For coco faster_rcnn or mask_rcnn, which
        also needs COCO's own annotations. Without a choice: raft_tiny for flow, raft for
        flying_chairs and sintel, mask_rcnn_tiny for detection.
      pattern: weights kept of each group, N:M, or blocks of N output channels and the fraction of
        them that is dropped, 1xN@S. Dense training watches the topology that this pattern would
        have.
      method: dense, one_shot, ste, sr_ste, sr_ste_decoupled or sr_ste_negative; for blocks also
        one_by_n, subp_l1 or subp.
      keep_dense: regular expressions of layers that stay dense. None for the task's, which are
        the first and the last layer; for blocks also the projections of ResNets without
        bottlenecks.
      epochs: passes over the training data. None for the recipe's: digits 60, cifar10 200,
        imagenet2012 120, number_names 8, wmt14 23, python_bytes 20 (of windows drawn at random),
        flow 5 and detection 12 (of generated images), flying_chairs and sintel 36, coco 12.
        Here and below, imagenet2012 with blocks has another recipe: 250 epochs, batches of 512, no
        warm-up, weight decay 1e-4 but none on vectors, label smoothing 0.1.
      batch_size: examples a step, over all devices. None for the recipe's: digits 25, cifar10
        128, imagenet2012 256, number_names 32, wmt14 1024, python_bytes 32 to 128,
        flow and detection 8, flying_chairs and sintel 4, coco 16.
      optimizer: sgd, or adamw. None for the recipe's: sgd for images, adamw for text,
        generated images and optical flow.
      learning_rate: peak, after linear warm-up and before the decay. None for the recipe's, 0.1
        for images.
      schedule: of the decay: cosine, or inverse_sqrt. None for the recipe's: inverse_sqrt for
        translation, cosine elsewhere.
      warmup_epochs: of the learning rate. None for the recipe's: digits epochs / 24, cifar10 and
        imagenet2012 5.
      momentum: of SGD, without Nesterov, or Adam's first beta. None for the recipe's, 0.9 in
        every task.
      second_momentum: Adam's second beta. None for the recipe's, 0.98.
      clip: largest norm of the gradient of all parameters together; 0 for no limit. None for the
        recipe's: 1 for python_bytes, 0 elsewhere.
      weight_decay: coupled with SGD, decoupled with AdamW. None for the recipe's: digits and
        imagenet2012 5e-5, cifar10 5e-4.
      decay_vectors: whether weight decay acts on biases and norms too. None for the recipe's,
        which does.
      lambda_w: strength of the sparse-refined term, for the methods that have one. None for the
        recipe's: 2e-4; in digits, whatever makes the total pull that of 120 epochs of ImageNet.
      lambda_decoupled: its strength for sr_ste_decoupled, after Adam's preconditioner. None for the
        recipe's.
      label_smoothing: share of the target spread over all classes. None for the recipe's, 0.
      ramp: when gradual pruning begins and ends, as fractions of the epochs. None for the
        recipe's: 0.04 and 0.72, of 250 epochs the published 10 and 180; in digits 0.04 and 0.4.
      seeds: of the initial weights and the order of the data. Several train together.
      dtype: the network computes in; parameters are float32, and masks come from those.
      accumulate: parts that a step takes its batch in, one after the other, to need less memory.
        Gradients are averaged over them; batch statistics are each part's own.
      remat: compute again in the backward pass what is neither a matrix product nor a convolution,
        to need less memory.
      devices: share each batch. None for all accelerators, or one CPU.
      mesh: of devices, instead of their number, such as data=4,model=2.
      axis_types: of the mesh's axes.
      layout: how the mesh splits parameters. data: not at all; fsdp: the last axis over the axes
        of the batch; tensor: the last axis over the mesh's last. What does not split evenly is
        whole on every device; the folder's layout.txt shows it.
      shard: how parameters are split that match a regular expression, REGEX=AXES with an entry for
        each of the trailing axes, such as 'out/kernel=model,*'. First match wins, before --layout.
      batch_axes: of the mesh, that split each batch. By default the first.
      distributed: this is one process of several, and the cluster (Slurm, Open MPI, Kubernetes,
        TPU) knows the others. JAX_COORDINATOR_ADDRESS in the environment implies it. A run's
        folder must be on a disk that all of them share.
      coordinator: HOST:PORT of process 0, where the cluster does not know it.
      processes: how many there are, with --coordinator.
      process: which one this is, from 0, with --coordinator.
      data_dir: folder of prepared data sets. None for $TFDS_DATA_DIR or ~/tensorflow_datasets.
      workers: processes that read images; 0 reads in this one.
      threads: that read images, in each process.
      runs_dir: folder of all runs.
      name: of this run's folder. None for TASK-MODEL-METHOD-PATTERN.
      resume: go on from the newest checkpoint of this name, if there is one. The result is that
        of a run never interrupted.
      checkpoint_every: epochs between two checkpoints. The last epoch always has one, and SIGTERM
        makes one at once.
      checkpoint_steps: optimizer steps between two more checkpoints within epochs; 0 for none.
      keep_checkpoints: how many of the newest to keep.
      keep_best: how many of the best to keep besides, by the task's first metric on the test
        examples.
      evaluate_every: epochs between two evaluations. The last epoch is always evaluated.
      log_every: steps between two lines of progress within an epoch; 0 for none.
    """

    task: TaskName = "digits"
    model: str | None = None
    pattern: str = "2:4"
    method: str = "sr_ste"
    keep_dense: tuple[str, ...] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: Literal["sgd", "adamw"] | None = None
    learning_rate: float | None = None
    schedule: Literal["cosine", "linear", "inverse_sqrt"] | None = None
    warmup_epochs: float | None = None
    momentum: float | None = None
    second_momentum: float | None = None
    clip: float | None = None
    weight_decay: float | None = None
    decay_vectors: bool | None = None
    lambda_w: float | None = None
    lambda_decoupled: float | None = None
    label_smoothing: float | None = None
    ramp: tuple[float, float] | None = None
    seeds: tuple[int, ...] = (0,)
    dtype: Literal["float32", "bfloat16"] = "float32"
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
    data_dir: Path | None = None
    workers: int = 0
    threads: int = 8
    runs_dir: Path = Path("runs")
    name: str | None = None
    resume: bool = False
    checkpoint_every: int = 1
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    keep_best: int = 1
    evaluate_every: int = 1
    log_every: int = 100

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        at_least = dict.fromkeys(("checkpoint_every", "keep_checkpoints", "evaluate_every"), 1)
        at_least |= dict.fromkeys(("workers", "threads", "log_every", "keep_best"), 0)
        at_least |= {"accumulate": 1, "checkpoint_steps": 0}
        if self.epochs is not None:
            at_least["epochs"] = 1
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.ramp is not None and not 0 <= self.ramp[0] < self.ramp[1] <= 1:
            raise ValueError(f"ramp must be two rising fractions of the epochs, got {self.ramp}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different numbers from 0, got {self.seeds}")

    @property
    def model_name(self) -> str:
        """The model, the task's where none is given."""
        return self.model or DEFAULT_MODELS[self.task]

    @property
    def folder(self) -> Path:
        """Where this run is kept."""
        pattern = self.pattern.replace(":", "_").replace("/", "_")
        name = self.name or f"{self.task}-{self.model_name}-{self.method}-{pattern}"
        return self.runs_dir / name


def make_job(flags: Flags) -> Job:
    """Makes task, plan and method.

    Raises:
      MissingDatasetError: if the data set has not been prepared.
      ValueError: if a flag asks for what there is not; the message says which.
    """
    check_fits(flags.method, flags.pattern)
    row = find_row(flags.method)
    strengths = {"--lambda-w": flags.lambda_w, "--lambda-decoupled": flags.lambda_decoupled}
    given = [flag for flag, value in strengths.items() if value is not None]
    if given and row.lambda_fraction == 0:
        raise ValueError(
            f"method {flags.method!r} has no sparse-refined term: drop {' and '.join(given)}"
        )
    task = make_task(flags)
    plan = plan_of(task, flags.pattern)
    method = row.build(plan, task.recipe, task.steps_per_epoch)
    return Job(task, plan, method, flags.accumulate)


def make_run_placement(flags: Flags, job: Job) -> Placement:
    """Where the run goes.

    Raises:
      ValueError: a flag asks for what there is not, or cuts groups or blocks.
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


def make_task(flags: Flags) -> Task:
    """Makes the task, with the recipe and the dense layers changed where a flag says so."""
    task = _task(flags)
    if flags.keep_dense is not None:
        task = dataclasses.replace(task, keep_dense=flags.keep_dense)
    if flags.remat:
        task = with_remat(task)
    return in_auto_axes(task) if flags.axis_types == "explicit" else task


def _task(flags: Flags) -> Task:
    # Imported here: tensorflow-datasets and scikit-learn take seconds, and no run needs both.
    if flags.task == "digits":
        return _digits(flags)
    if flags.task in ("number_names", "wmt14", "python_bytes"):
        return _of_tokens(flags)
    if flags.task in ("detection", "coco"):
        return _of_objects(flags)
    if flags.task in ("flow", "flying_chairs", "sintel"):
        return _of_flow(flags)
    from experiments.data.epochs import Reading
    from experiments.models.images.networks import dense_for_blocks

    blocks = is_blocks(flags.pattern)
    dense = {"keep_dense": dense_for_blocks(flags.model_name)} if blocks else {}
    if flags.task == "cifar10":
        from experiments.tasks.cifar10 import RECIPE as CIFAR10_RECIPE
        from experiments.tasks.cifar10 import cifar10_task as make_image_task

        recipe = CIFAR10_RECIPE
    else:
        from experiments.tasks.imagenet2012 import BLOCK_RECIPE
        from experiments.tasks.imagenet2012 import RECIPE as IMAGENET_RECIPE
        from experiments.tasks.imagenet2012 import imagenet2012_task as make_image_task

        recipe = BLOCK_RECIPE if blocks else IMAGENET_RECIPE
    return make_image_task(
        flags.model_name,
        recipe=_changed(recipe, flags),
        data_dir=flags.data_dir,
        dtype=jnp.dtype(flags.dtype),
        reading=Reading(workers=flags.workers, threads=flags.threads),
        **dense,
    )


def _digits(flags: Flags) -> Task:
    from experiments.tasks.digits import digits_task

    _check_only_model(flags, ("float32", "bfloat16"))
    # These two decide the rest of its recipe.
    given: dict[str, Any] = {"epochs": flags.epochs, "batch_size": flags.batch_size}
    task = digits_task(**{name: value for name, value in given.items() if value is not None})
    task = dataclasses.replace(task, recipe=_changed(task.recipe, flags))
    # Its network has no dtype of its own, as the others have.
    return in_bfloat16(task) if flags.dtype == "bfloat16" else task


def _of_tokens(flags: Flags) -> Task:
    dtype = jnp.dtype(flags.dtype)
    if flags.task == "python_bytes":
        from experiments.tasks.python_bytes import find_recipe, python_bytes_task

        recipe = _changed(find_recipe(flags.model_name), flags)
        return python_bytes_task(flags.model_name, recipe=recipe, dtype=dtype)
    if flags.task == "number_names":
        from experiments.tasks.number_names import RECIPE, number_names_task

        recipe = _changed(RECIPE, flags)
        return number_names_task(flags.model_name, recipe=recipe, dtype=dtype)
    from experiments.tasks.wmt14 import RECIPE as WMT14_RECIPE
    from experiments.tasks.wmt14 import wmt14_task

    recipe = _changed(WMT14_RECIPE, flags)
    return wmt14_task(flags.model_name, recipe=recipe, dtype=dtype, data_dir=flags.data_dir)


def _of_objects(flags: Flags) -> Task:
    _check_only_model(flags)
    if flags.task == "detection":
        from experiments.tasks.detection import RECIPE, detection_task

        return detection_task(recipe=_changed(RECIPE, flags))
    from experiments.data.epochs import Reading
    from experiments.tasks.coco import RECIPE as COCO_RECIPE
    from experiments.tasks.coco import coco_task

    return coco_task(
        flags.model_name,
        recipe=_changed(COCO_RECIPE, flags),
        data_dir=flags.data_dir,
        reading=Reading(workers=flags.workers, threads=flags.threads),
    )


def _of_flow(flags: Flags) -> Task:
    _check_only_model(flags)
    if flags.task == "flow":
        from experiments.tasks.flow import RECIPE, flow_task

        return flow_task(recipe=_changed(RECIPE, flags))
    from experiments.data.epochs import Reading
    from experiments.tasks.flying_chairs import RECIPE as CHAIRS_RECIPE

    recipe = _changed(CHAIRS_RECIPE, flags)
    reading = Reading(workers=flags.workers, threads=flags.threads)
    if flags.task == "sintel":
        from experiments.tasks.sintel import sintel_task

        return sintel_task(recipe=recipe, data_dir=flags.data_dir, reading=reading)
    from experiments.tasks.flying_chairs import flying_chairs_task

    return flying_chairs_task(recipe=recipe, data_dir=flags.data_dir, reading=reading)


def _check_only_model(flags: Flags, dtypes: tuple[str, ...] = ("float32",)) -> None:
    """Raises ValueError if a task is asked for a model that it has not, or for other dtypes."""
    models = (DEFAULT_MODELS[flags.task], *_OTHER_MODELS.get(flags.task, ()))
    if flags.model_name not in models or flags.dtype not in dtypes:
        raise ValueError(
            f"{flags.task} is trained with the model {' or '.join(models)} in "
            f"{' or '.join(dtypes)} only, got {flags.model_name} in {flags.dtype}"
        )


def _changed(recipe: Recipe, flags: Flags) -> Recipe:
    """The recipe with the flags of the same names in place of its numbers."""
    given = {entry.name: getattr(flags, entry.name) for entry in dataclasses.fields(recipe)}
    return dataclasses.replace(
        recipe, **{name: value for name, value in given.items() if value is not None}
    )
