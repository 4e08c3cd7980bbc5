"""Evaluation: clean and robust accuracy, sample by sample, with intervals."""
