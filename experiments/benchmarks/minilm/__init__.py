"""A real sentence encoder, pruned with data by every method."""
