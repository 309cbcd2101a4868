"""The papers' claims at a size that anyone can run again."""
