"""Memories that outlive a step: the first-in-first-out queue of embeddings."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.collectives import gather, replicas
from disco_jax.ops.losses import unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """A ring buffer of unit embeddings; MoCo's dictionary (arXiv:1911.05722, section 3.2).

    Attributes:
      vectors: f32[K, D], unit rows; bf16 after `stored(half=True)`. Where replicas share a queue,
        f32 or bf16[K / replicas, D] inside the step: those rows that this replica pushed.
      pointer: i32[], the row that the next push overwrites first, of all K.
      shared: rows that all replicas push at a time, if each of them keeps its own; 0: every
        replica keeps all.
    """

    vectors: Array
    pointer: Array
    shared: int = dataclasses.field(default=0, metadata={"static": True})

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

    @property
    def size(self) -> int:
        """K, inside the step."""
        return len(self.vectors) * (replicas() if self.shared else 1)

    def stored(self, half: bool, shared: int = 0) -> "Queue":
        """The queue in bfloat16, which takes half the memory, or in float32; see `shared`."""
        vectors = self.vectors.astype(jnp.bfloat16 if half else jnp.float32)
        return Queue(vectors, self.pointer, shared)

    def rewound(self) -> "Queue":
        """The same rows with the oldest first, so that pushes of any size can go on."""
        vectors = jnp.roll(self.vectors, -self.pointer, axis=0)
        return dataclasses.replace(self, vectors=vectors, pointer=jnp.zeros((), jnp.int32))

    def dealt(self, count: int) -> "Queue":
        """A whole queue that is shared, as `count` replicas keep it.

        Of each push the replicas have pushed equal parts in turn, and keep them in that order.

        Args:
          count: divides `shared`, which divides K; `pointer` is a multiple of `shared`.

        Returns:
          A queue with vectors [count, K / count, D].
        """
        size, dim = self.vectors.shape
        parts = self.vectors.reshape(size // self.shared, count, self.shared // count, dim)
        vectors = parts.transpose(1, 0, 2, 3).reshape(count, size // count, dim)
        return dataclasses.replace(self, vectors=vectors)

    def collected(self) -> "Queue":
        """Undoes `dealt`: vectors [count, K / count, D] -> [K, D]."""
        count, mine, dim = self.vectors.shape
        parts = self.vectors.reshape(count, -1, self.shared // count, dim)
        vectors = parts.transpose(1, 0, 2, 3).reshape(count * mine, dim)
        return dataclasses.replace(self, vectors=vectors)

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
        pointer = (self.pointer + rows.shape[0]) % size
        return dataclasses.replace(self, vectors=vectors, pointer=pointer)

    def push_all(self, rows: Array) -> "Queue":
        """`push` of the rows of all replicas, which need not meet where the queue is shared.

        Args:
          rows: f32[B, D], unit rows of this replica.
        """
        if not self.shared:
            return self.push(gather(rows))
        count = replicas()
        assert len(rows) * count == self.shared, (rows.shape, count, self.shared)
        mine = dataclasses.replace(self, pointer=self.pointer // count).push(rows)
        return dataclasses.replace(mine, pointer=mine.pointer * count)
