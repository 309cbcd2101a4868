"""Pretrain or distil a student with any method, from one config."""

from disco_jax.train.prepare import check
from disco_jax.workflows.pretrain import run

__all__ = ["check", "run"]
