"""Sweeps: a file for each table or figure."""
