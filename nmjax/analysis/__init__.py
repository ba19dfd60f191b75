"""Costs, sharding checks, pictures and timings."""
