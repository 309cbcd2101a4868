"""Sweeps: one a table or figure of a paper."""
