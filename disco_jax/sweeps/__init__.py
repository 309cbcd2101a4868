"""Sweeps: many runs from one config, and the table that they come to."""
