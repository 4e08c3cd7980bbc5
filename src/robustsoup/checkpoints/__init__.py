"""Checkpoints: weights and their provenance, read from and written to files."""
