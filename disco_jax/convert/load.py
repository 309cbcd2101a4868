"""PyTorch checkpoints in: read, recognised, and loaded whole. Nothing in a file is executed."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

import disco_jax.convert.containers as containers
import disco_jax.convert.safetensors_file as safetensors_file
import disco_jax.convert.shards as shards
from disco_jax import models
from disco_jax.convert.fill import SIDE, check_numbers, fill
from disco_jax.convert.names import timm_xcit
from disco_jax.convert.pickles import read as read_pickle
from disco_jax.convert.recognise import State, recognise
from disco_jax.convert.shards import locate
from disco_jax.convert.text import shown
from disco_jax.errors import UserError
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.ops.memory import Queue

_QUEUES = ("module.queue", "queue")


@dataclasses.dataclass(frozen=True)
class Imported:
    """A network of the PyTorch world in ours.

    Attributes:
      encoder: computes in float32.
      variables: {"params", "batch_stats"} of it, NumPy float32.
      spec: the fields of a network's part of a config that describe it.
      family: one of `recognise.FAMILIES`.
      layout: of the backbone's names.
      normalisation: mean and standard deviation of its input in [0, 1], by channel.
      keys: key in the file -> path of ours.
      left: keys in the file that belong to something else.
      container: the entry of the file that held the state dict; "": the file itself.
      queue: MoCo's queue of keys, where there is one.
      classifiers: what the keys of classifiers begin with, which are among those left.
    """

    encoder: Encoder
    variables: Variables
    spec: dict[str, Any]
    family: str
    layout: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    keys: dict[str, str]
    left: tuple[str, ...]
    container: str = ""
    queue: Queue | None = None
    classifiers: tuple[str, ...] = ()


def load(path: str, **options: Any) -> tuple[Encoder, Variables]:
    """The network of a checkpoint file.

    Args:
      path: a `.pth`, `.pth.tar`, `.pt`, `.pkl` or `.safetensors` file; of weights in several
        files their index, or the folder that holds it.
      **options: `entry`, see `read`; and those of `from_mapping`.

    Returns:
      The encoder and its variables: `encoder.apply(variables, images, norm="running")` on
      normalised float32[B, H, W, 3] gives `features`, `embedding` and `scores`.

    Raises:
      UserError: see `read` and `from_mapping`.
    """
    imported = read_network(path, **options)
    return imported.encoder, imported.variables


def from_state_dict(state: Mapping[str, np.ndarray], **options: Any) -> tuple[Encoder, Variables]:
    """`load` for a mapping of full keys to arrays in PyTorch's layout."""
    imported = from_mapping(state, **options)
    return imported.encoder, imported.variables


def read_network(path: str, *, entry: str = "", **options: Any) -> Imported:
    """`load`, with all that is known of the network; for `entry` see `read`."""
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
    """The network of a state dict, every key of it accounted for.

    Args:
      state: full keys to arrays in PyTorch's layout: convolutions OIHW, linear layers [out, in].
      family: one of `recognise.FAMILIES`; "": from the keys.
      arch: a backbone of ours; "": from the shapes.
      prefix: where the network stands, e.g. "module.teacher_encoder_q."; None: the network that
        the checkpoint is about.
      allow: patterns (`fnmatch`) of keys that may be left over, and of our paths that may be
        missing and then start afresh.
      source: what to call the state dict in messages.

    Raises:
      UserError: nothing known is there; or keys are missing, left over or of another shape, all
        of which are listed; or weights are not finite numbers.
    """
    state = timm_xcit({key: np.asarray(value) for key, value in state.items()})
    found = recognise(state, source, family, arch, prefix, allow)
    encoder = _build(found.spec)
    variables, keys, left = fill(encoder, state, found, tuple(allow), source)
    spec = found.spec
    if spec["head"] == "none":
        spec = {**spec, "dim": _dim(encoder, variables)}
    return Imported(
        encoder=encoder,
        variables=variables,
        spec=spec,
        family=found.family,
        layout=found.layout.name,
        normalisation=found.normalisation,
        keys=keys,
        left=left,
        queue=_queue(state, spec["dim"], source),
        classifiers=tuple(found.place.prefix + root for root in found.head.classifiers),
    )


def read(path: str, entry: str = "") -> tuple[dict[str, np.ndarray], str]:
    """Every array of a checkpoint file under its full key, and the entry that held them.

    Args:
      path: of the file; of the index of several, or of the folder that holds it.
      entry: where in the file the weights are, e.g. "student" of DINO's checkpoints, dots between
        names; "": where training scripts usually put them, or the only entry with a network.

    Raises:
      UserError: no such file, a file that is damaged, holds no weights, or asks to run code.
    """
    file = locate(epath.Path(path))
    if not file.exists():
        raise UserError(f"{path} does not exist.")
    if file.is_dir():
        raise UserError(
            f"{path} is a directory without weights: give a checkpoint file of PyTorch, or a "
            "folder with model.safetensors or an index of several such files."
        )
    if not file.is_file():
        raise UserError(f"{path} is no regular file.")
    if file.suffix != ".safetensors" and not shards.is_index(file):
        return containers.find(read_pickle(file), str(path), entry)
    if entry:
        raise UserError(f"{path} has no entries: leave --entry={shown(entry)} out.")
    if shards.is_index(file):
        return shards.read(file, lambda one: containers.arrays_of(read_pickle(one))), ""
    return safetensors_file.read(file), ""


def size_and_digest(path: str) -> tuple[int, str]:
    """Bytes and SHA-256, in hexadecimal, of a file or of all that an index lists, in order."""
    size, summed = 0, hashlib.sha256()
    for part in shards.files(locate(epath.Path(path))):
        with part.open("rb") as file:
            while block := file.read(2**20):
                summed.update(block)
                size += len(block)
    return size, summed.hexdigest()


def _build(spec: Mapping[str, Any]) -> Encoder:
    full = {"zero_init_residual": False, "norm_group": 0, **spec}
    return models.build_encoder(ConfigDict(full), setting="the checkpoint's")


def _dim(encoder: Encoder, variables: Variables) -> int:
    """The width of the embedding."""
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
    """The row of a queue that is the next to be replaced."""
    found = np.ravel(state.get(f"{name}_ptr", 0))
    if len(found) != 1 or found.dtype.kind not in "iu" or not 0 <= found[0] < rows:
        return 0
    return int(found[0])
