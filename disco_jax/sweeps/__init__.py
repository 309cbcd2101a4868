"""Sweeps: many runs from one config, and a table of their results."""
