"""What a run is at a step: arrays only, with no device axis, equal on all replicas."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from disco_jax.methods.base import Method, Record
from disco_jax.models.encoder import Encoded, Network, Variables
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.memory import Queue

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a pretraining run.

    Attributes:
      step: i32[], steps taken.
      student: {"params", "batch_stats"} of what is learned.
      momentum: the same of its EMA copy, {} if the method has none.
      memory: objective -> its memory (queues).
      opt_state: the optimizer's.
    """

    step: Array
    student: Variables
    momentum: Variables
    memory: Mapping[str, Any]
    opt_state: Any


def create(
    method: Method,
    tx: optax.GradientTransformation,
    seed: int,
    size: int,
    inherited: Queue | None = None,
) -> TrainState:
    """The state at step 0, on the host; nothing is compiled for the networks.

    Args:
      method: what is learned.
      tx: the optimizer.
      seed: of the initial weights and queues.
      size: of the images in px.
      inherited: the queue that came with the teacher, if one did.
    """
    student = method.networks["student"].encoder.create(seed, size)
    record = _shapes(method, student, size)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        momentum=student if "momentum" in method.plan else {},
        memory=method.memory(jax.random.fold_in(jax.random.key(seed), 1), record, inherited),
        opt_state=tx.init(student["params"]),
    )


def everywhere(tree: Tree, devices: Sequence[jax.Device] | None = None) -> Tree:
    """A copy of every leaf on each device of the pod, as the step takes it.

    Without it the first step would donate arrays that live on one local device only, which fails
    across hosts.

    Args:
      tree: arrays on the host.
      devices: where to; None: all of all hosts.
    """
    mesh = jax.sharding.Mesh(np.array(devices or jax.devices()), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    here = sorted(sharding.addressable_devices, key=lambda device: device.id)

    def put(leaf: Array) -> Array:
        # From host memory, so that no two leaves share a device buffer; a device at a time, as one
        # call for all hosts would first compare every leaf between them.
        leaf = np.array(leaf)
        copies = [jax.device_put(leaf, device, may_alias=False) for device in here]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return jax.tree.map(put, tree)


def _shapes(method: Method, student: Variables, size: int) -> Record:
    """A record of `jax.ShapeDtypeStruct`s: what the networks make of a batch."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

    def shape(network: Network, variables: Variables) -> Encoded:
        apply = network.encoder.apply
        return jax.eval_shape(lambda v, x: apply(v, x, norm="running"), variables, images)

    encoded = {}
    for name, views in method.plan.items():
        network = method.networks[name]
        # A teacher's variables are not at hand, and only the shape of its embedding is asked for.
        variables = student
        if name == "teacher":
            variables = jax.eval_shape(
                lambda x, n=network: n.encoder.init(jax.random.key(0), x, norm="running"), images
            )
        encoded[name] = dict.fromkeys(views, shape(network, variables))
    return Record(encoded, {})
