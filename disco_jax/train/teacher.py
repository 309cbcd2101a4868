"""The frozen teacher: from a run of this package or from a PyTorch checkpoint."""

import dataclasses
import logging
from typing import Any

import jax
import optax
from etils import epath

from disco_jax import convert, errors, methods
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.ops.memory import Queue
from disco_jax.train import checkpoint, state, workdir

_LOG = logging.getLogger(__name__)

RANDOM = "random"
# What must be the same in a teacher's run and in `config.teacher`.
SHAPE = ("backbone", "width", "stem", "hidden", "dim")
# The bank of MoCo's keys, which the official file carries: view 1 is the key.
KEYS = "view_1"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Frozen weights.

    Attributes:
      variables: {"params", "batch_stats"} of the encoder.
      queue: the queue of keys that was saved with them, if there is one (disagreement D3).
    """

    variables: Variables
    queue: Queue | None = None


def load(spec: Any, encoder: Encoder, size: int) -> Teacher:
    """The teacher that `config.teacher` names.

    Args:
      spec: `config.teacher`; `weights` is a workdir, a PyTorch file, or "random".
      encoder: what `spec` describes.
      size: of the images in px.

    Raises:
      UserError: no weights given, nothing there, or weights of another network.
    """
    if not spec.weights:
        raise errors.UserError(
            "config.teacher.weights is empty: the teacher has nothing to teach. Give the workdir "
            "of a pretraining run, a MoCo checkpoint in PyTorch's format, or 'random' to try "
            "things out."
        )
    if spec.weights == RANDOM:
        _LOG.warning("The teacher is random: this run tries things out, nothing more.")
        return Teacher(encoder.create(1, size))
    path = epath.Path(spec.weights)
    if not path.exists():
        raise errors.UserError(f"config.teacher.weights={spec.weights!r} does not exist.")
    if path.is_dir():
        return _from_run(path, spec, encoder, size)
    variables, vectors = convert.load(path, encoder.create(0, size))
    return Teacher(variables, vectors)


def _from_run(path: epath.Path, spec: Any, encoder: Encoder, size: int) -> Teacher:
    config = workdir.read_config(path)
    other = [
        f"config.teacher.{field}={spec[field]!r}, but the run has {config.student[field]!r}"
        for field in SHAPE
        if spec[field] != config.student[field]
    ]
    if other:
        raise errors.UserError(
            f"The network in {path} is not the one described:\n  " + "\n  ".join(other)
        )
    method = methods.build(config)
    abstract = jax.eval_shape(lambda: state.create(method, optax.identity(), 0, size))
    variables, step = checkpoint.load(path, "student", abstract.student)
    _LOG.info("Teacher: step %d of %s", step, path)
    queue = abstract.memory.get("contrast", {}).get(KEYS)
    if queue is not None:
        memory, _ = checkpoint.load(path, "memory", abstract.memory)
        queue = memory["contrast"][KEYS]
    return Teacher(variables, queue)
