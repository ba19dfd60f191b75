"""Tasks to train on: one file per task, with its data, model, loss and metric."""
