"""Recipes: one a file. `common.py` has what they share, `small.py` fits them to small images."""
