"""What can be trained on: one file a task, with its data, model, loss and metric."""
