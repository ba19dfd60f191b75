"""Data sets, their augmentation and the order in which they are read."""
