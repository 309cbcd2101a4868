"""Reads and writes PyTorch checkpoints. Nothing in a file is executed."""

from disco_jax.convert.load import Imported, from_mapping, from_state_dict, load, read, read_network
from disco_jax.convert.sharded_weights import locate

__all__ = ["Imported", "from_mapping", "from_state_dict", "load", "locate", "read", "read_network"]
