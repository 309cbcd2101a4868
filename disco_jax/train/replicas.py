"""Whether what should be equal on all replicas is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.errors import NumericError
from disco_jax.train import hosts
from disco_jax.train.state import copied


def check(tree: Any, step: int) -> None:
    """Compares every copy of every array of a replicated tree, bit by bit, by fingerprints.

    Args:
      tree: arrays with a whole copy on each device, as `state.everywhere` makes them; of what
        devices share there are no copies, and it is left out.
      step: for the message.

    Raises:
      NumericError: on all processes, when a copy differs; names the first arrays that do.
    """
    leaves = jax.tree_util.tree_flatten_with_path(copied(tree))[0]
    # [processes][devices of a process][leaves]
    found = np.asarray(hosts.everyone(_fingerprints([leaf for _, leaf in leaves])))
    copies = found.reshape(-1, len(leaves))
    differing = (copies != copies[0]).any(axis=0)
    if differing.any():
        pairs = zip(leaves, differing, strict=True)
        names = [jax.tree_util.keystr(path) for (path, _), bad in pairs if bad]
        raise NumericError(
            f"The replicas differ after step {step}, in {len(names)} arrays: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. A device computes "
            "wrongly, or an operation of the step depends on the replica."
        )


def _fingerprints(leaves: list[jax.Array]) -> np.ndarray:
    """u32[local devices, leaves]."""
    copies = zip(
        *([shard.data for shard in leaf.addressable_shards] for leaf in leaves), strict=True
    )
    return np.asarray(jax.device_get([_of_copy(list(copy)) for copy in copies]), np.uint32)


@jax.jit
def _of_copy(leaves: list[jax.Array]) -> jax.Array:
    """u32[leaves]: sums over all bits that change with any one of them and with their places."""
    sums = []
    for leaf in leaves:
        words = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
        words = jax.lax.bitcast_convert_type(words, f"uint{8 * words.dtype.itemsize}").ravel()
        weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
        sums.append(jnp.sum(words.astype(jnp.uint32) * weights, dtype=jnp.uint32))
    return jnp.stack(sums)
