"""Meshes, layouts and processes."""
