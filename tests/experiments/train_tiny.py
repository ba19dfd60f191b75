"""`python -m tests.experiments.train_tiny`: experiments.train, with a task that compiles fast."""

import sys

import experiments.flags
from experiments.train import main
from tests.experiments.tiny import tiny_task

if __name__ == "__main__":
    experiments.flags._task = lambda flags: tiny_task(epochs=flags.epochs)
    sys.exit(main())
