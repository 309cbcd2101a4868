"""Memories that outlive a step: the first-in-first-out queue of embeddings."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.losses import unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """A ring buffer of unit embeddings; MoCo's dictionary (arXiv:1911.05722, section 3.2).

    Attributes:
      vectors: f32[K, D], unit rows; bf16 after `stored(half=True)`.
      pointer: i32[], the row that the next push overwrites first.
    """

    vectors: Array
    pointer: Array

    @classmethod
    def create(cls, rng: Array, size: int, dim: int) -> "Queue":
        """A queue of `size` random directions in `dim` dimensions, as MoCo starts."""
        return cls(unit(jax.random.normal(rng, (size, dim))), jnp.zeros((), jnp.int32))

    @classmethod
    def uniform(cls, rng: Array, size: int, dim: int) -> "Queue":
        """A queue as CompRess starts it: U(+-sqrt(3 / D)), of length 1 on average only."""
        edge = (3 / dim) ** 0.5
        vectors = jax.random.uniform(rng, (size, dim), minval=-edge, maxval=edge)
        return cls(vectors, jnp.zeros((), jnp.int32))

    @classmethod
    def empty(cls, size: int, dim: int) -> "Queue":
        """A queue of `size` zero rows in `dim` dimensions, as SwAV starts."""
        return cls(jnp.zeros((size, dim), jnp.float32), jnp.zeros((), jnp.int32))

    @property
    def full(self) -> Array:
        """bool[]: whether a queue that started `empty` has been filled."""
        return jnp.any(self.vectors[-1] != 0)

    def stored(self, half: bool) -> "Queue":
        """The queue in bfloat16, which takes half the memory, or in float32."""
        return Queue(self.vectors.astype(jnp.bfloat16 if half else jnp.float32), self.pointer)

    def push(self, rows: Array) -> "Queue":
        """The queue with its oldest rows replaced.

        Args:
          rows: f32[B, D], unit rows of the global batch, in the order of the batch, B <= K. A
            push goes on at the first row where it meets the end; if B divides K it never does.

        Raises:
          AssertionError: while tracing, when a shape or dtype above does not hold.
        """
        chex.assert_type(rows, jnp.float32)
        rows = rows.astype(self.vectors.dtype)
        size, dim = self.vectors.shape
        chex.assert_shape(rows, (None, dim))
        assert rows.shape[0] <= size, (size, rows.shape)
        if size % rows.shape[0]:
            places = (self.pointer + jnp.arange(rows.shape[0])) % size
            vectors = self.vectors.at[places].set(rows)
        else:
            vectors = jax.lax.dynamic_update_slice(self.vectors, rows, (self.pointer, 0))
        return Queue(vectors, (self.pointer + rows.shape[0]) % size)
