"""Parameter trees: names of leaves, path rules, and spans of axes."""
