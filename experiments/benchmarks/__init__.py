"""How long things take, as ratios to a baseline of the same run."""
