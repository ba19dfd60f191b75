"""Masks: importance scores and a pattern decide which weights stay."""
