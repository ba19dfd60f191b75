"""Transformers and decoding."""
