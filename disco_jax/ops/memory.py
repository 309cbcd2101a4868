"""Memory that is carried from step to step: the first-in-first-out queue of embeddings."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.collectives import gather, replicas
from disco_jax.ops.queues import DEFAULT_ACCESS, QueueAccess
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class QueueSettings:
    """Settings of a run for its queues. They change results only by rounding.

    Attributes:
      half: store vectors in bfloat16, which takes half the memory.
      shared: see `Queue.shared`.
      access: see `Queue.access`.
    """

    half: bool = False
    shared: int = 0
    access: QueueAccess = DEFAULT_ACCESS


DEFAULT_SETTINGS = QueueSettings()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """A ring buffer of unit embeddings: MoCo's dictionary (arXiv:1911.05722, section 3.2).

    Attributes:
      vectors: f32[K, D], unit rows; bf16 after `stored(half=True)`. If the queue is sharded, f32 or
        bf16[K / replicas, D] inside the step: the rows that this replica pushed.
      pointer: i32[], index in 0..K-1 of the first row that the next push overwrites.
      shared: 0 if every replica stores the whole queue. Otherwise the queue is sharded, each
        replica stores the rows it pushed, and this is the number of rows that all replicas together
        push in one step.
      access: how similarities to the rows are computed.
    """

    vectors: Array
    pointer: Array
    shared: int = dataclasses.field(default=0, metadata={"static": True})
    access: QueueAccess = dataclasses.field(default=DEFAULT_ACCESS, metadata={"static": True})

    @classmethod
    def create(cls, rng: Array, size: int, dim: int) -> "Queue":
        """Creates a queue of `size` random unit rows of `dim` dimensions, MoCo's initialisation."""
        return cls(l2_normalize(jax.random.normal(rng, (size, dim))), jnp.zeros((), jnp.int32))

    @classmethod
    def uniform(cls, rng: Array, size: int, dim: int) -> "Queue":
        """Creates a queue with entries U(+-sqrt(3 / D)), CompRess's initialisation.

        Its rows have squared length 1 only on average.
        """
        edge = (3 / dim) ** 0.5
        vectors = jax.random.uniform(rng, (size, dim), minval=-edge, maxval=edge)
        return cls(vectors, jnp.zeros((), jnp.int32))

    @classmethod
    def empty(cls, size: int, dim: int) -> "Queue":
        """Creates a queue of `size` zero rows of `dim` dimensions, SwAV's initialisation."""
        return cls(jnp.zeros((size, dim), jnp.float32), jnp.zeros((), jnp.int32))

    @property
    def full(self) -> Array:
        """bool[], true once a queue created by `empty` has been filled."""
        return jnp.any(self.vectors[-1] != 0)

    @property
    def size(self) -> int:
        """K, the number of rows on all replicas; valid inside the step."""
        return len(self.vectors) * (replicas() if self.shared else 1)

    def stored(self, half: bool, shared: int = 0, access: QueueAccess = DEFAULT_ACCESS) -> "Queue":
        """Returns the queue with other `QueueSettings`."""
        vectors = self.vectors.astype(jnp.bfloat16 if half else jnp.float32)
        return Queue(vectors, self.pointer, shared, access)

    def rewound(self) -> "Queue":
        """Rotates the rows so that the oldest comes first and the pointer is 0.

        Pushes of any size can then continue.
        """
        vectors = jnp.roll(self.vectors, -self.pointer, axis=0)
        return dataclasses.replace(self, vectors=vectors, pointer=jnp.zeros((), jnp.int32))

    def shard(self, count: int) -> "Queue":
        """Splits a whole queue into the shards that `count` replicas store.

        Each push consists of equal parts from the replicas in their order. Each replica stores its
        own parts in the order of the pushes.

        Args:
          count: number of replicas. Divides `shared`, which divides K; `pointer` is a multiple of
            `shared`.

        Returns:
          A queue with vectors [count, K / count, D].
        """
        size, dim = self.vectors.shape
        parts = self.vectors.reshape(size // self.shared, count, self.shared // count, dim)
        vectors = parts.transpose(1, 0, 2, 3).reshape(count, size // count, dim)
        return dataclasses.replace(self, vectors=vectors)

    def unshard(self) -> "Queue":
        """Inverts `shard`: merges vectors [count, K / count, D] to [K, D]."""
        count, rows, dim = self.vectors.shape
        parts = self.vectors.reshape(count, -1, self.shared // count, dim)
        vectors = parts.transpose(1, 0, 2, 3).reshape(count * rows, dim)
        return dataclasses.replace(self, vectors=vectors)

    def push(self, rows: Array) -> "Queue":
        """Overwrites the oldest rows.

        Args:
          rows: f32[B, D], unit rows of the global batch, in the order of the batch. If B does not
            divide K, a push may wrap around the end of the buffer. If B > K, the last K rows
            replace all.

        Raises:
          AssertionError: while tracing, if a shape or dtype differs from those above.
        """
        chex.assert_type(rows, jnp.float32)
        rows = rows.astype(self.vectors.dtype)
        size, dim = self.vectors.shape
        chex.assert_shape(rows, (None, dim))
        if rows.shape[0] >= size:
            return dataclasses.replace(
                self, vectors=rows[rows.shape[0] - size :], pointer=jnp.zeros((), jnp.int32)
            )
        if size % rows.shape[0]:
            indices = (self.pointer + jnp.arange(rows.shape[0])) % size
            vectors = self.vectors.at[indices].set(rows)
        else:
            vectors = jax.lax.dynamic_update_slice(self.vectors, rows, (self.pointer, 0))
        pointer = (self.pointer + rows.shape[0]) % size
        return dataclasses.replace(self, vectors=vectors, pointer=pointer)

    def push_all(self, rows: Array) -> "Queue":
        """Pushes the rows of all replicas; without communication if the queue is sharded.

        Args:
          rows: f32[B, D], unit rows of this replica.

        Raises:
          AssertionError: while tracing, if the queue is sharded and the replicas' rows do not add
            up to `shared`.
        """
        if not self.shared:
            return self.push(gather(rows))
        count = replicas()
        assert len(rows) * count == self.shared <= self.size, (rows.shape, self.size, self.shared)
        shard = dataclasses.replace(self, pointer=self.pointer // count).push(rows)
        return dataclasses.replace(shard, pointer=shard.pointer * count)
