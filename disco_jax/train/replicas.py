"""Checks that replicated arrays are bit-identical on all devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.errors import NumericError
from disco_jax.run import hosts
from disco_jax.train.state import without_sharded_rows


def check(tree: Any, step: int) -> None:
    """Compares the fingerprints of all device copies of every array of a replicated tree.

    Args:
      tree: arrays with a whole copy on each device, from `state.replicate`. Sharded queues have
        no copies and are skipped.
      step: for the message.

    Raises:
      NumericError: on all processes, if a copy differs; names the first differing arrays.
    """
    leaves = jax.tree_util.tree_flatten_with_path(without_sharded_rows(tree))[0]
    # [processes][devices of a process][leaves]
    fingerprints = np.asarray(hosts.all_gather(_fingerprints([leaf for _, leaf in leaves])))
    copies = fingerprints.reshape(-1, len(leaves))
    differing = (copies != copies[0]).any(axis=0)
    if differing.any():
        pairs = zip(leaves, differing, strict=True)
        names = [jax.tree_util.keystr(path) for (path, _), bad in pairs if bad]
        raise NumericError(
            f"The replicas differ after step {step}, in {len(names)} arrays: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. Either a device computes "
            "wrong results or an operation of the step depends on the replica."
        )


def _fingerprints(leaves: list[jax.Array]) -> np.ndarray:
    """Returns the fingerprints of this process's copies, u32[local_devices, leaves]."""
    copies = zip(
        *([shard.data for shard in leaf.addressable_shards] for leaf in leaves), strict=True
    )
    return np.asarray(jax.device_get([_fingerprint(list(copy)) for copy in copies]), np.uint32)


@jax.jit
def _fingerprint(leaves: list[jax.Array]) -> jax.Array:
    """Returns u32[leaves], sums that depend on the value and the position of every word."""
    sums = []
    for leaf in leaves:
        words = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
        words = jax.lax.bitcast_convert_type(words, f"uint{8 * words.dtype.itemsize}").ravel()
        weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
        sums.append(jnp.sum(words.astype(jnp.uint32) * weights, dtype=jnp.uint32))
    return jnp.stack(sums)
