"""Collective operations between replicas. No other file names the device axis.

The functions run inside `pmap` or `vmap` with `axis_name=AXIS`, on any number of devices.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

AXIS = "replica"
# Algorithms of `shuffle`.
EXCHANGES = ("gather", "all_to_all")

Tree = TypeVar("Tree")


def pmean(tree: Tree) -> Tree:
    """Returns the mean of every leaf over the replicas."""
    return jax.lax.pmean(tree, AXIS)


def group_pmean(tree: Tree, groups: int) -> Tree:
    """Returns the mean of every leaf over this replica's group of adjacent replicas.

    Args:
      tree: small arrays; every replica receives those of all.
      groups: number of groups, which divides the number of replicas; 1: `pmean`.
    """
    if groups == 1:
        return pmean(tree)
    size = replicas() // groups

    def average(leaf: Array) -> Array:
        rows = jax.lax.all_gather(leaf, AXIS).reshape(groups, size, *leaf.shape)
        return jnp.mean(rows, axis=1)[jax.lax.axis_index(AXIS) // size]

    return jax.tree.map(average, tree)


def psum(tree: Tree) -> Tree:
    """Returns the sum of every leaf over the replicas."""
    return jax.lax.psum(tree, AXIS)


def pmax(tree: Tree) -> Tree:
    """Returns the elementwise maximum of every leaf over the replicas, without a gradient."""
    return jax.lax.pmax(jax.lax.stop_gradient(tree), AXIS)


def gather(rows: Array) -> Array:
    """Concatenates the rows [B, ...] of all replicas, in their order, to [replicas * B, ...]."""
    return jax.lax.all_gather(rows, AXIS, tiled=True)


def psum_scatter(rows: Array) -> Array:
    """Sums [replicas * B, ...] over the replicas and returns this replica's slice [B, ...]."""
    return jax.lax.psum_scatter(rows, AXIS, tiled=True)


def positions(batch: int) -> Array:
    """Returns the indices of this replica's `batch` rows in the global batch, i32[batch]."""
    return jax.lax.axis_index(AXIS) * batch + jnp.arange(batch, dtype=jnp.int32)


def shuffle(rng: Array, rows: Array, exchange: str = "gather") -> tuple[Array, Array]:
    """Permutes the rows of the global batch across replicas.

    MoCo's shuffled BatchNorm (arXiv:1911.05722, section 3.3): a key's batch statistics must not
    come from the same images as its query's.

    Args:
      rng: a random key, equal on all replicas.
      rows: [B, ...] of this replica.
      exchange: "gather": every replica receives all rows. "all_to_all": every replica receives only
        its B rows; available on TPUs only. Both return the same rows.

    Returns:
      [B, ...], this replica's slice of the permuted global batch, and i32[replicas * B], the
      permutation, which `unshuffle` takes.

    Raises:
      AssertionError: if `exchange` is not one of `EXCHANGES`.
    """
    assert exchange in EXCHANGES, exchange
    batch = rows.shape[0]
    order = jax.random.permutation(rng, batch * replicas())
    if exchange == "all_to_all":
        return _exchange(rows, order), order
    return gather(rows)[order[positions(batch)]], order


def _exchange(rows: Array, order: Array) -> Array:
    """Returns this replica's slice of the global rows in order `order`, by a ragged all-to-all.

    Rows are sent sorted by target replica and received sorted by source replica.
    """
    batch, me = rows.shape[0], jax.lax.axis_index(AXIS)
    source = order // batch  # the replica that sends the row of each position
    target = jnp.arange(len(order)) // batch  # the replica that holds each position
    counts = jnp.zeros((replicas(), replicas()), jnp.int32).at[source, target].add(1)
    outgoing = jnp.argsort(jnp.argsort(order)[positions(batch)])  # own rows by new position
    ends = jnp.cumsum(counts[me])
    starts = jnp.cumsum(counts, axis=0) - counts  # offset of a source's rows at a target
    received = jax.lax.ragged_all_to_all(
        rows[outgoing], jnp.zeros_like(rows), ends - counts[me], counts[me],
        starts[me], counts[:, me], axis_name=AXIS,
    )  # fmt: skip
    # Rows of one source arrive in the order of their positions, which is the order of a stable sort
    # of positions by source.
    return received[jnp.argsort(jnp.argsort(source[positions(batch)], stable=True))]


def unshuffle(rows: Array, order: Array) -> Array:
    """Inverts `shuffle`: returns this replica's own rows from shuffled rows [B, ...]."""
    own = jnp.argsort(order)[positions(rows.shape[0])]
    return gather(rows)[own]


def local_slice(rows: Array) -> Array:
    """Returns this replica's slice [N / replicas, ...] of rows [N, ...].

    Args:
      rows: [N, ...], equal on all replicas.

    Raises:
      AssertionError: while tracing, if N is not a multiple of the number of replicas.
    """
    assert rows.shape[0] % replicas() == 0, (rows.shape, replicas())
    size = rows.shape[0] // replicas()
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(AXIS) * size, size)


def replicas() -> int:
    """Returns the number of replicas."""
    return jax.lax.axis_size(AXIS)
