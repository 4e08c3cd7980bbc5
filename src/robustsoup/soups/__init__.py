"""Soups: one checkpoint made from several."""
