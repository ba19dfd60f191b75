"""What the tasks of one kind share."""
