"""Linear classifier on the output of a network: its state, its training step and its scores."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from disco_jax import errors
from disco_jax.evaluate.probe_settings import DistillSettings
from disco_jax.ops.collectives import pmean
from disco_jax.ops.losses import softened_cross_entropy
from disco_jax.ops.vectors import l2_normalize

INITS = ("normal", "torch")
REDUCTIONS = ("element", "batch")
_EPSILON = 1e-5  # added to variances, as in CompRess
_ROWS = 4096  # rows per device call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProbeState:
    """State of a training with labels.

    Attributes:
      step: i32[], steps taken.
      params: {"classifier": {"kernel": f32[F, C], "bias": f32[C]}}, and "network" if all layers
        are trained.
      stats: BatchNorm statistics of the network, {} if it is frozen.
      opt_state: state of the optimizer.
    """

    step: Array
    params: dict[str, Any]
    stats: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Trained linear classifier.

    Attributes:
      kernel: f32[F, C].
      bias: f32[C].
      feature_stats: {"mean", "deviation": f32[F]} of L2-normalized features, see
        `classifier.feature_stats`; {} if the classifier reads features unchanged.
    """

    kernel: np.ndarray
    bias: np.ndarray
    feature_stats: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Computes logits f32[N, C] of features f32[N, F], in blocks of rows."""
        params = {"kernel": self.kernel, "bias": self.bias}
        parts = [rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS)]
        return np.concatenate(
            [np.asarray(_logits(params, x, dict(self.feature_stats))) for x in parts]
        )


def init(kind: str, dim: int, classes: int, seed: int) -> dict[str, np.ndarray]:
    """Initializes {"kernel": f32[dim, classes], "bias": f32[classes]}.

    Args:
      kind: "normal": kernel from N(0, 0.01), bias 0, as in MoCo; "torch": PyTorch's default,
        U(+-1/sqrt(dim)) for both.
      dim: F, width of the features.
      classes: C, number of classes.
      seed: seed of the random draws.

    Raises:
      UserError: if `kind` is unknown.
    """
    if kind not in INITS:
        raise errors.unknown("config.init", kind, INITS)
    rng = np.random.default_rng(seed)
    if kind == "normal":
        kernel = rng.normal(0.0, 0.01, (dim, classes))
        return {"kernel": kernel.astype(np.float32), "bias": np.zeros(classes, np.float32)}
    bound = dim**-0.5
    shapes = {"kernel": (dim, classes), "bias": (classes,)}
    return {name: rng.uniform(-bound, bound, s).astype(np.float32) for name, s in shapes.items()}


def feature_stats(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Computes per-dimension statistics of L2-normalized features (CompRess, arXiv:2010.14713).

    Args:
      rows: f32[N, F], features of the training images.

    Returns:
      {"mean": f32[F], "deviation": f32[F]}; the deviation is sqrt(variance + 1e-5).
    """
    scaled = np.concatenate(
        [
            np.asarray(l2_normalize(jnp.asarray(rows[i : i + _ROWS])))
            for i in range(0, len(rows), _ROWS)
        ]
    )
    return {"mean": scaled.mean(0), "deviation": np.sqrt(scaled.var(0) + _EPSILON)}


def logits(params: Mapping[str, Array], rows: Array, feature_stats: Mapping[str, Array]) -> Array:
    """Computes logits f32[B, C] of features f32[B, F].

    The matrix product runs at full float32 precision, whatever the default of the accelerator. A
    non-empty `feature_stats` normalizes the features first.
    """
    if feature_stats:
        rows = (l2_normalize(rows) - feature_stats["mean"][None]) / feature_stats["deviation"][None]
    product = jnp.matmul(rows, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + params["bias"][None]


_logits = jax.jit(logits)

# (params, state, frozen, batch) -> logits f32[B, C] and updated BatchNorm statistics.
Forward = Callable[[Any, ProbeState, Any, Any], tuple[Array, Any]]


def make_step(
    tx: optax.GradientTransformation,
    forward: Forward,
    *,
    head_rate: float = 1.0,
    distill: DistillSettings | None = None,
    teach: Callable[[ProbeState, Any, Any], Array] | None = None,
):
    """Builds the training step of one replica, with the loop's signature (state, frozen, batch).

    Args:
      tx: the optimizer.
      forward: see `Forward`.
      head_rate: learning rate of the classifier divided by that of the network.
      distill: weight, temperature and reduction; see `softened_cross_entropy`.
      teach: (state, frozen, batch) -> logits f32[B, C] of the teacher; None trains on labels only.

    Returns:
      A function (state, frozen, batch) -> (`ProbeState`, {"loss", "accuracy" in percent}). Images
      with a `batch["learned"]` f32[B] of 0 are left out, e.g. held-out ones.
    """

    def step(state: ProbeState, frozen: Any, batch: Mapping[str, Array]):
        target = None if teach is None else jax.lax.stop_gradient(teach(state, frozen, batch))

        def loss_fn(params):
            scores, stats = forward(params, state, frozen, batch)
            losses = _losses(scores, batch["labels"], target, distill)
            correct = (jnp.argmax(scores, axis=-1) == batch["labels"]).astype(jnp.float32)
            return _mean(losses, batch), (stats, _mean(correct, batch))

        (loss, (stats, correct)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grads, stats, loss, correct = pmean((grads, stats, loss, correct))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        if head_rate != 1.0:
            scaled = jax.tree.map(lambda u: head_rate * u, updates["classifier"])
            updates = {**updates, "classifier": scaled}
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "accuracy": 100 * correct}
        return ProbeState(state.step + 1, params, stats, opt_state), metrics

    return step


def _mean(values: Array, batch: Mapping[str, Array]) -> Array:
    """Returns a replica's share of the mean over the learned images of all replicas.

    Args:
      values: f32[B].
      batch: may have "learned", f32[B]: 0 for images that do not count.
    """
    if "learned" not in batch:
        return jnp.mean(values)
    count = jnp.maximum(pmean(jnp.sum(batch["learned"])), 1e-6)  # all may be held out
    return jnp.sum(values * batch["learned"]) / count


def check_distill(distill: DistillSettings) -> None:
    """Checks the distillation settings.

    Raises:
      UserError: names the invalid setting.
    """
    if not 0 <= distill.weight <= 1:
        raise errors.UserError(f"config.distill.weight={distill.weight} must be in the range 0..1.")
    if distill.temperature <= 0:
        raise errors.UserError("config.distill.temperature must be above 0.")
    if distill.reduction not in REDUCTIONS:
        raise errors.unknown("config.distill.reduction", distill.reduction, REDUCTIONS)
    if bool(distill.weight) != bool(distill.teacher):
        raise errors.UserError(
            f"config.distill.weight={distill.weight} and config.distill.teacher="
            f"{distill.teacher!r}: distillation needs both; set both or neither."
        )


def _losses(
    scores: Array, labels: Array, target: Array | None, distill: DistillSettings | None
) -> Array:
    """Computes the loss of each image, f32[B]."""
    if target is None or distill is None:
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return softened_cross_entropy(
        scores,
        target,
        labels,
        alpha=distill.weight,
        temperature=distill.temperature,
        reduction=distill.reduction,
    )
