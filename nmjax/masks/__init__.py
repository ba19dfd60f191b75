"""Masks: importance scores and a pattern decide which weights are kept."""
