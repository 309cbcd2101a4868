"""PyTorch checkpoints in: read, recognised, and loaded whole. Nothing in a file is executed."""

import dataclasses
import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, models
from disco_jax.convert.names import timm_xcit
from disco_jax.convert.pickles import read as read_pickle
from disco_jax.convert.recognise import Recognised, State, recognise
from disco_jax.convert.table import entries
from disco_jax.errors import UserError
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.ops.memory import Queue

# Where a training script puts the weights, in the order in which they are looked for; DINO keeps
# a student beside the teacher, its average, which is the network that it releases.
_CONTAINERS = ("state_dict", "teacher", "model", "student", "net", "state_dict_ema", "model_ema")
_QUEUES = ("module.queue", "queue")
_SHOWN = 20
_SIDE = 64  # of the images that shapes are worked out with, px; no weight depends on it


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


def load(path: str, **options: Any) -> tuple[Encoder, Variables]:
    """The network of a checkpoint file.

    Args:
      path: a `.pth`, `.pth.tar`, `.pt`, `.pkl` or `.safetensors` file.
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
        of which are listed.
    """
    state = timm_xcit({key: np.asarray(value) for key, value in state.items()})
    found = recognise(state, source, family, arch, prefix)
    encoder = _build(found.spec)
    variables, keys, left = _fill(encoder, state, found, tuple(allow), source)
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
        queue=_queue(state, spec["dim"]),
    )


def read(path: str, entry: str = "") -> tuple[dict[str, np.ndarray], str]:
    """Every array of a checkpoint file under its full key, and the entry that held them.

    Args:
      path: of the file.
      entry: where in the file the weights stand, e.g. "student" of DINO's checkpoints, dots
        between names; "": where training scripts usually put them.

    Raises:
      UserError: no such file, a file that is damaged, holds no weights, or asks to run code.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{path} does not exist.")
    if not file.is_file():
        raise UserError(f"{path} is a directory, not a checkpoint file of PyTorch.")
    if file.suffix == ".safetensors":
        return _read_safetensors(file), ""
    content, container = read_pickle(file), []
    for name in entry.split(".") if entry else ():
        if not isinstance(content, dict) or name not in content:
            held = content if isinstance(content, dict) else ()
            raise errors.unknown(f"An entry of {path}", name, map(str, held))
        content = content[name]
        container.append(name)
    # Best accuracies and the like may stand as arrays beside the state dict.
    while inner := next((n for n in _CONTAINERS if _holds_dict(content, n)), None):
        content = content[inner]
        container.append(inner)
    arrays = _arrays(content)
    if not arrays:
        kinds = ", ".join(map(str, content)) if isinstance(content, dict) else type(content)
        raise UserError(f"{path} holds no state dict; it holds: {kinds}.")
    return arrays, ".".join(container)


def digest(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(spec: Mapping[str, Any]) -> Encoder:
    full = {"zero_init_residual": False, "norm_group": 0, **spec}
    return models.build_encoder(ConfigDict(full), setting="the checkpoint's")


def _dim(encoder: Encoder, variables: Variables) -> int:
    """The width of the embedding."""
    images = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), np.float32)
    out = jax.eval_shape(lambda v, x: encoder.apply(v, x, norm="running"), variables, images)
    return out.embedding.shape[-1]


def _fill(
    encoder: Encoder,
    state: State,
    found: Recognised,
    allow: tuple[str, ...],
    source: str,
) -> tuple[Variables, dict[str, str], tuple[str, ...]]:
    """Variables of `encoder`, key -> path for those taken, and the keys of other networks."""
    like = jax.eval_shape(lambda: encoder.create(0, _SIDE))
    leaves, structure = jax.tree_util.tree_flatten_with_path(dict(like))
    wanted = {tuple(k.key for k in path): leaf.shape for path, leaf in leaves}
    taken, keys, problems = {}, {}, []
    for entry in entries(encoder, found.layout, found.place, found.head):
        if entry.theirs not in state or entry.ours not in wanted:
            continue
        value = entry.leaf.load(state[entry.theirs])
        keys[entry.theirs] = "/".join(entry.ours)
        taken[entry.ours] = value
        if value.shape != wanted[entry.ours]:
            problems.append(
                f"{entry.theirs}: shape {state[entry.theirs].shape}, which makes {value.shape} "
                f"instead of {wanted[entry.ours]}"
            )
    fresh = [path for path in wanted if path not in taken]
    problems += [f"missing: {'/'.join(p)}" for p in fresh if not _allowed("/".join(p), allow)]
    left = [k for k in state if k not in keys and not k.endswith("num_batches_tracked")]
    own = (found.place.prefix, *([found.place.head] if found.place.head else []))
    problems += [
        f"left over: {key}"
        for key in left
        if key.startswith(own) and not _known_extra(key) and not _allowed(key, allow)
    ]
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(
            f"{source} does not fit the {found.spec['backbone']} with the head "
            f"{found.spec['head']!r} that its keys speak of:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + more
            + "\nKeys that may be missing or left over can be allowed by a pattern."
        )
    if fresh:
        taken |= _fresh(encoder, fresh)
    arrays = [np.ascontiguousarray(taken[path], np.float32) for path in wanted]
    return jax.tree.unflatten(structure, arrays), keys, tuple(left)


def _fresh(encoder: Encoder, paths: list[tuple[str, ...]]) -> dict[Any, np.ndarray]:
    """Initial values of what a checkpoint does not hold."""
    made, created = {}, encoder.create(0, _SIDE)
    for path in paths:
        leaf = created
        for part in path:
            leaf = leaf[part]
        made[path] = np.asarray(leaf)
    return made


def _allowed(key: str, allow: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in allow)


def _known_extra(key: str) -> bool:
    """Queues and centres beside a network are no part of it."""
    return key.rpartition(".")[2] in ("queue", "queue_ptr", "queue2", "small_queue", "center")


def _queue(state: State, dim: int) -> Queue | None:
    for name in _QUEUES:
        vectors = state.get(name)
        if vectors is not None and vectors.ndim == 2 and len(vectors) == dim:
            pointer = int(np.ravel(state.get(f"{name}_ptr", 0))[0])
            rows = np.ascontiguousarray(vectors.T, np.float32)
            return Queue(jnp.asarray(rows), jnp.int32(pointer))
    return None


def _holds_dict(content: Any, name: str) -> bool:
    """Whether there is a dict with anything in it under a name."""
    return isinstance(content, dict) and bool(content.get(name)) and isinstance(content[name], dict)


def _arrays(content: Any) -> dict[str, np.ndarray]:
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, np.ndarray)}


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from error
