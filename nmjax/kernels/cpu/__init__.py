"""Products with packed weights on CPUs."""
