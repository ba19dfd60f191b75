"""Costs, sharding checks, plots and timings."""
