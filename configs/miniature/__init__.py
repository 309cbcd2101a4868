"""The papers' claims at a size that a single machine can reproduce."""
