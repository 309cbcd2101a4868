"""Everything that crosses replicas. The only file that names the device axis.

The functions run inside `pmap` or `vmap` with `axis_name=AXIS`, on one device as on many.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

AXIS = "replica"
# How `shuffle` moves rows.
EXCHANGES = ("gather", "all_to_all")

Tree = TypeVar("Tree")


def pmean(tree: Tree) -> Tree:
    """The mean of every leaf over the replicas."""
    return jax.lax.pmean(tree, AXIS)


def total(tree: Tree) -> Tree:
    """The sum of every leaf over the replicas."""
    return jax.lax.psum(tree, AXIS)


def highest(tree: Tree) -> Tree:
    """The elementwise maximum of every leaf over the replicas; no gradient passes."""
    return jax.lax.pmax(jax.lax.stop_gradient(tree), AXIS)


def gather(rows: Array) -> Array:
    """[B, ...] of this replica -> [replicas * B, ...] of all, in the order of the replicas."""
    return jax.lax.all_gather(rows, AXIS, tiled=True)


def scatter(rows: Array) -> Array:
    """[replicas * B, ...] of each replica -> [B, ...]: this one's part of the sum of them all."""
    return jax.lax.psum_scatter(rows, AXIS, tiled=True)


def positions(batch: int) -> Array:
    """i32[B]: where this replica's `batch` rows stand in the global batch."""
    return jax.lax.axis_index(AXIS) * batch + jnp.arange(batch, dtype=jnp.int32)


def shuffle(rng: Array, rows: Array, exchange: str = "gather") -> tuple[Array, Array]:
    """Trades rows between replicas by one permutation that all of them draw.

    MoCo's shuffled BatchNorm (arXiv:1911.05722, section 3.3): a key's batch statistics must not
    come from the very images that its query was normalised with.

    Args:
      rng: a key, equal on all replicas.
      rows: [B, ...] of this replica.
      exchange: "gather" has every replica receive all rows; "all_to_all" the B it needs, on TPUs
        alone. The result is the same.

    Returns:
      [B, ...], this replica's part of the permuted global batch, and i32[replicas * B], the
      permutation, for `unshuffle`.
    """
    assert exchange in EXCHANGES, exchange
    batch = rows.shape[0]
    order = jax.random.permutation(rng, batch * replicas())
    if exchange == "all_to_all":
        return _traded(rows, order), order
    return gather(rows)[order[positions(batch)]], order


def _traded(rows: Array, order: Array) -> Array:
    """This replica's part of the global rows in the order `order`, by a ragged all-to-all.

    Rows leave sorted by where they go and arrive sorted by where they come from.
    """
    batch, me = rows.shape[0], jax.lax.axis_index(AXIS)
    source = order // batch  # replica that a place gets its row from
    target = jnp.arange(len(order)) // batch  # replica that has a place
    counts = jnp.zeros((replicas(), replicas()), jnp.int32).at[source, target].add(1)
    leave = jnp.argsort(jnp.argsort(order)[positions(batch)])  # own rows by their places
    ends = jnp.cumsum(counts[me])
    begins = jnp.cumsum(counts, axis=0) - counts  # where a source's rows begin at a target
    arrived = jax.lax.ragged_all_to_all(
        rows[leave], jnp.zeros_like(rows), ends - counts[me], counts[me], begins[me], counts[:, me],
        axis_name=AXIS,
    )  # fmt: skip
    # A source's rows arrive by their places, as a stable sort of the places by source has them.
    return arrived[jnp.argsort(jnp.argsort(source[positions(batch)], stable=True))]


def unshuffle(rows: Array, order: Array) -> Array:
    """Undoes `shuffle`: [B, ...] in shuffled places -> this replica's own rows."""
    mine = jnp.argsort(order)[positions(rows.shape[0])]
    return gather(rows)[mine]


def share(rows: Array) -> Array:
    """[N, ...], equal on all replicas -> this replica's [N / replicas, ...] of them, in order.

    Raises:
      AssertionError: while tracing, when the replicas do not divide N.
    """
    assert rows.shape[0] % replicas() == 0, (rows.shape, replicas())
    mine = rows.shape[0] // replicas()
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(AXIS) * mine, mine)


def replicas() -> int:
    """The number of replicas."""
    return jax.lax.axis_size(AXIS)
