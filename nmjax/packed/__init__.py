"""Packed weights: kept values and where they were."""
