"""Reads PyTorch checkpoints, recognises their networks and loads them completely."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import disco_jax.convert.containers as containers
import disco_jax.convert.safetensors_file as safetensors_file
import disco_jax.convert.sharded_weights as sharded_weights
from disco_jax import models, typed
from disco_jax.convert.backbones import FAMILIES
from disco_jax.convert.family import State
from disco_jax.convert.fill import SIDE, check_numbers, fill
from disco_jax.convert.pickles import read as read_pickle
from disco_jax.convert.recognise import recognise
from disco_jax.convert.sharded_weights import locate
from disco_jax.convert.text import shown
from disco_jax.errors import UserError
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.ops.memory import Queue

_QUEUES = ("module.queue", "queue")


@dataclasses.dataclass(frozen=True)
class Imported:
    """A network converted from a PyTorch checkpoint.

    Attributes:
      encoder: the network; computes in float32.
      variables: its {"params", "batch_stats"}, NumPy float32.
      spec: the config fields that describe the network.
      family: one of `recognise.FAMILIES`.
      layout: the name of the layout of the backbone's keys.
      normalisation: mean and standard deviation of each channel of its input in [0, 1].
      keys: key in the file -> path in the variables.
      unused_keys: keys in the file that belong to something else.
      container: the entry of the file that held the state dict; "": the file itself.
      queue: MoCo's queue of keys; None if the file has none.
      classifiers: prefixes of the keys of classifiers, which are among the unused keys.
    """

    encoder: Encoder
    variables: Variables
    spec: dict[str, Any]
    family: str
    layout: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    keys: dict[str, str]
    unused_keys: tuple[str, ...]
    container: str = ""
    queue: Queue | None = None
    classifiers: tuple[str, ...] = ()


def load(path: str, **options: Any) -> tuple[Encoder, Variables]:
    """Loads the network of a checkpoint file.

    Args:
      path: a `.pth`, `.pth.tar`, `.pt`, `.pkl` or `.safetensors` file; for weights in several
        files, their index or the folder that holds it.
      **options: `entry` of `read`, and the options of `from_mapping`.

    Returns:
      The encoder and its variables: `encoder.apply(variables, images, norm="running")` on
      normalised float32[B, H, W, 3] returns `features`, `embedding` and `scores`.

    Raises:
      UserError: see `read` and `from_mapping`.
    """
    imported = read_network(path, **options)
    return imported.encoder, imported.variables


def from_state_dict(state: Mapping[str, np.ndarray], **options: Any) -> tuple[Encoder, Variables]:
    """Loads a network as `load` does, from full keys to arrays in PyTorch's layout."""
    imported = from_mapping(state, **options)
    return imported.encoder, imported.variables


def read_network(path: str, *, entry: str = "", **options: Any) -> Imported:
    """Loads a network as `load` does and returns all facts about it; see `read` for `entry`."""
    state, container = read(path, entry)
    imported = from_mapping(state, source=str(path), **options)
    return dataclasses.replace(imported, container=container)


def from_mapping(
    state: Mapping[str, np.ndarray],
    *,
    family: str = "",
    arch: str = "",
    prefix: str | None = None,
    allow: Sequence[str] = (),
    source: str = "The state dict",
) -> Imported:
    """Loads the network of a state dict and accounts for every key.

    Args:
      state: full keys to arrays in PyTorch's layout: convolutions OIHW, linear layers [out, in].
      family: one of `recognise.FAMILIES`; "": inferred from the keys.
      arch: the name of a backbone; "": inferred from the shapes.
      prefix: of the network's keys, e.g. "module.teacher_encoder_q."; None: the main network of the
        checkpoint.
      allow: patterns (`fnmatch`) of keys that may be left over, and of paths in the variables that
        may be missing and then get their initial values.
      source: the name of the state dict in messages.

    Raises:
      UserError: no known network is there; or keys are missing, left over or of the wrong shape
        (the message lists them); or weights are not finite numbers.
    """
    state = {key: np.asarray(value) for key, value in state.items()}
    for declared in FAMILIES:
        state = declared.translate(state)
    network = recognise(state, source, family, arch, prefix, allow)
    encoder = _build(network.spec)
    variables, keys, unused_keys = fill(encoder, state, network, tuple(allow), source)
    spec = network.spec
    if spec["head"] == "none":
        spec = {**spec, "dim": _embedding_width(encoder, variables)}
    return Imported(
        encoder=encoder,
        variables=variables,
        spec=spec,
        family=network.family,
        layout=network.layout.name,
        normalisation=network.normalisation,
        keys=keys,
        unused_keys=unused_keys,
        queue=_queue(state, spec["dim"], source),
        classifiers=tuple(network.prefix.root + root for root in network.head.classifiers),
    )


def read(path: str, entry: str = "") -> tuple[dict[str, np.ndarray], str]:
    """Reads every array of a checkpoint file.

    Args:
      path: the file, the index of several files, or the folder that holds the index.
      entry: the path of the weights in the file, e.g. "student" for DINO's checkpoints, dots
        between names; "": the entry that training scripts usually use, or the only one with a
        network.

    Returns:
      The arrays under their full keys, and the path of the entry that held them.

    Raises:
      UserError: the file does not exist, is damaged, holds no weights, or asks to run code.
    """
    file = locate(epath.Path(path))
    if not file.exists():
        raise UserError(f"{path} does not exist.")
    if file.is_dir():
        raise UserError(
            f"{path} is a directory without weights: give a PyTorch checkpoint, or a folder with "
            "model.safetensors or the index of several such files."
        )
    if not file.is_file():
        raise UserError(f"{path} is not a regular file.")
    if file.suffix != ".safetensors" and not sharded_weights.is_index(file):
        return containers.find(read_pickle(file), str(path), entry)
    if entry:
        raise UserError(f"{path} has no entries: leave out --entry={shown(entry)}.")
    if sharded_weights.is_index(file):
        return sharded_weights.read(file, lambda part: containers.arrays_of(read_pickle(part))), ""
    return safetensors_file.read(file), ""


def size_and_digest(path: str) -> tuple[int, str]:
    """Returns the bytes and the hexadecimal SHA-256 of a file.

    For an index, both cover the index and the files that it lists, in order.
    """
    size, digest = 0, hashlib.sha256()
    for part in sharded_weights.files(locate(epath.Path(path))):
        with part.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
                size += len(block)
    return size, digest.hexdigest()


def _build(spec: Mapping[str, Any]) -> Encoder:
    network = typed.parse(models.NetworkSpec, spec, "the checkpoint's", defaults=True)
    return models.build_encoder(network, setting="the checkpoint's")


def _embedding_width(encoder: Encoder, variables: Variables) -> int:
    """Returns the width of the embedding."""
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32)
    out = jax.eval_shape(lambda v, x: encoder.apply(v, x, norm="running"), variables, images)
    return out.embedding.shape[-1]


def _queue(state: State, dim: int, source: str) -> Queue | None:
    for name in _QUEUES:
        vectors = state.get(name)
        if vectors is not None and vectors.ndim == 2 and len(vectors) == dim and vectors.size:
            check_numbers({name: vectors}, source)
            rows = np.ascontiguousarray(vectors.T, np.float32)
            return Queue(jnp.asarray(rows), jnp.int32(_pointer(state, name, len(rows))))
    return None


def _pointer(state: State, name: str, rows: int) -> int:
    """Returns the index of the queue's oldest row, 0 if the file holds no valid index."""
    pointer = np.ravel(state.get(f"{name}_ptr", 0))
    if len(pointer) != 1 or pointer.dtype.kind not in "iu" or not 0 <= pointer[0] < rows:
        return 0
    return int(pointer[0])
