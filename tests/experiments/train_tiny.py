"""`python -m tests.experiments.train_tiny`: experiments.train, with a task that compiles fast."""

import dataclasses
import os
import signal
import sys
from functools import partial

import numpy as np

import experiments.training.flags
from experiments.data.epochs import eval_epoch
from experiments.distributed.processes import leave_if_interrupted
from experiments.train import main
from tests.experiments.tiny import tiny_task, with_predictions


class Examples:
    """The examples of a task's test set; notes which are read."""

    def __init__(self, task):
        batches = list(task.eval_batches())
        valid = np.concatenate([batch.pop("valid") for batch in batches]) != 0
        self.arrays = {
            name: np.concatenate([batch[name] for batch in batches])[valid] for name in batches[0]
        }
        self.read = []

    def __len__(self):
        return len(self.arrays["label"])

    def __getitem__(self, index):
        self.read.append(index)
        return {name: values[index] for name, values in self.arrays.items()}


def make_task(flags):
    task = tiny_task(epochs=flags.epochs, width=int(os.environ.get("TINY_WIDTH", "16")))
    rows = partial(eval_epoch, EXAMPLES, dict, batch_size=32)
    identity = (("corpus", str(flags.data_dir)),)
    return with_predictions(dataclasses.replace(task, eval_rows=rows, identity=identity))


if __name__ == "__main__":
    EXAMPLES = Examples(tiny_task())
    experiments.training.flags.find_task = lambda name: make_task
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # As `experiments.train` does.
    print(f"{len(EXAMPLES.read)} test examples read", file=sys.stderr)
    leave_if_interrupted(status)
    sys.exit(status)
