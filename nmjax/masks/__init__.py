"""Which weights stay: importance scores and a pattern give a boolean mask."""
