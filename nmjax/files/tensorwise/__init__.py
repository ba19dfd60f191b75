"""Checkpoints that are larger than memory: read, changed and written tensor by tensor."""
