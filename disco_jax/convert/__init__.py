"""PyTorch checkpoints in. Nothing in a file is executed."""

from disco_jax.convert.load import describe, from_state_dict, load, read

__all__ = ["describe", "from_state_dict", "load", "read"]
