"""Pytrees: paths of leaves, rules on paths, spans of axes."""
