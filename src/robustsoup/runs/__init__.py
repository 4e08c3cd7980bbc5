"""Runs: plan a recipe, execute the steps that the store lacks, write the run folder."""
