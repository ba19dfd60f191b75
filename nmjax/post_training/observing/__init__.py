"""Runs a traced program and sums up the inputs of its weights."""
