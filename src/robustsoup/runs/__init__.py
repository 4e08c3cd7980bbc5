"""Runs: plan what a recipe asks for, keep what is finished, do what is missing."""
