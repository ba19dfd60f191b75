"""The order in which examples are seen, and the batches they come in.

What an epoch holds depends on (records, transform, batch size, seed, epoch) and on nothing
else: not on the number of threads or worker processes, nor on the step one starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import grain
import numpy as np
from absl import flags

from experiments.data.batches import Batch, Rows

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Indexed(Protocol[T_co]):
    """Examples that can be asked for by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


@dataclass(frozen=True)
class Reading:
    """Number of reader processes and threads. It changes only the speed.

    Attributes:
      workers: processes; 0 reads in this one. Each takes seconds to start, every epoch.
      threads: in each process; each works on a batch of its own. 0 reads in the main thread.
    """

    workers: int = 0
    threads: int = 4


def train_epoch(
    records: Indexed[T],
    transform: Callable[[T, np.random.Generator], Batch],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    rows: Rows | None = None,
    reading: Reading = Reading(),
) -> Iterator[Batch]:
    """Yields the batches of one epoch, in an order and with augmentations of its own.

    Every example is seen at most once. The last `len(records) % batch_size` of the order are left
    out, which are other examples in each epoch.

    Args:
      records: the examples, by index.
      transform: `(example, generator) -> arrays of one example`; can be pickled, if there are
        worker processes. The generator's state depends on seed, epoch and place in the order.
      batch_size: examples a batch.
      seed: of the run, not negative.
      epoch: which epoch of the run, from 0.
      first_step: batches to leave out at the start, without reading them.
      rows: of each batch, all by default; the others are not read here.
      reading: threads and processes.
    """
    # grain takes a single number. Hashed, so that seed 1 at epoch 2 is not seed 2 at epoch 1.
    both = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    examples = grain.MapDataset.source(records).seed(both).shuffle().random_map(transform)
    # A data set of batch numbers, instead of `examples.batch`: a batch reads the rows of this
    # process only, and batches before `first_step` are skipped without reading.
    batches = grain.MapDataset.range(len(records) // batch_size).map(
        partial(_batch_rows, examples, batch_size, np.arange(batch_size) if rows is None else rows)
    )
    return _read(batches[first_step:], reading)


def eval_epoch(
    records: Indexed[T],
    transform: Callable[[T], Batch],
    *,
    batch_size: int,
    rows_of: Callable[[int], Rows] = np.arange,
    reading: Reading = Reading(),
) -> Iterator[Batch]:
    """Yields every example once, in the order of the records, in batches of one shape.

    Each batch has a "valid" array (batch_size,): 1, or 0 where it is padded with zeros.

    Args:
      records: the examples, by index.
      transform: `example -> arrays of one example`.
      batch_size: examples a batch.
      rows_of: batch size -> rows of each batch; the others are not read here.
        Rows from the batch size on are padding.
      reading: threads and processes.
    """
    examples = grain.MapDataset.source(records).map(transform)
    batches = grain.MapDataset.range(-(-len(records) // batch_size)).map(
        partial(_padded_rows, examples, batch_size, rows_of(batch_size))
    )
    return _read(batches, reading)


def steps_per_epoch(records: Indexed[T], batch_size: int) -> int:
    """Returns how many full batches the examples make.

    Raises:
      ValueError: if they do not make one.
    """
    if not 1 <= batch_size <= len(records):
        raise ValueError(f"batch_size must be from 1 to {len(records)} examples, got {batch_size}")
    return len(records) // batch_size


def pad_batch(batch: Batch, batch_size: int) -> Batch:
    """Fills a batch up with zeros and adds "valid", 1 for examples and 0 for padding."""
    count = len(next(iter(batch.values())))
    missing = batch_size - count
    padded = {
        name: np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)) if missing else values
        for name, values in batch.items()
    }
    return {**padded, "valid": (np.arange(batch_size) < count).astype(np.int32)}


def _batch_rows(examples: Any, batch_size: int, rows: Rows, index: int) -> Batch:
    # What is not asked for is not read.
    chosen = [examples[index * batch_size + int(row)] for row in rows]
    return {name: np.stack([example[name] for example in chosen]) for name in chosen[0]}


def _padded_rows(examples: Any, batch_size: int, rows: Rows, index: int) -> Batch:
    there = rows[rows < min(batch_size, len(examples) - index * batch_size)]
    if len(there):
        return pad_batch(_batch_rows(examples, batch_size, there, index), len(rows))
    # A batch of padding only has the shapes of any example.
    nothing = {
        name: values[:0] for name, values in _batch_rows(examples, 1, rows[:1] * 0, 0).items()
    }
    return pad_batch(nothing, len(rows))


def _read(batches: Any, reading: Reading) -> Iterator[Batch]:
    # The buffer counts batches, and a batch of ImageNet takes 150 MB.
    options = grain.ReadOptions(
        num_threads=reading.threads, prefetch_buffer_size=max(2, reading.threads)
    )
    dataset = batches.to_iter_dataset(options)
    if reading.workers:
        # grain's worker processes ask for absl's flags, which only an absl program parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=reading.workers, per_worker_buffer_size=2)
        )
    iterator = iter(dataset)
    try:
        for batch in iterator:
            # Copied, because the worker frees memory that it shares with this process.
            yield {name: _own(values) for name, values in batch.items()}
    finally:
        # Otherwise workers go on reading for a consumer that stopped early.
        iterator.close()


def _own(values: Any) -> np.ndarray:
    return values if type(values) is np.ndarray else np.array(values)
