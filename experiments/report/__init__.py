"""The report of a comparison: findings, figures, one HTML page."""
