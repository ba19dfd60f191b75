"""Packed weights and parameters in files."""
