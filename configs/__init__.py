"""Recipes: a file a recipe, `common.py` what they share."""
