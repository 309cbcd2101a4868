"""Linear probe: a linear classifier on features extracted once, trained by the shared loop."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.data.pipeline import to_devices
from disco_jax.errors import UserError
from disco_jax.evaluate import classifier, scores
from disco_jax.evaluate.classifier import Classifier, ProbeState
from disco_jax.evaluate.probe_settings import ProbeSettings
from disco_jax.ops.schedules import Schedule
from disco_jax.run.checkpoint import Checkpoints
from disco_jax.run.metrics import Logger
from disco_jax.train import loop, optimizer
from disco_jax.train.state import replicate
from disco_jax.train.step import parallel

# (step, state) -> metrics on the test images.
Evaluate = Callable[[int, ProbeState], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Batch size and schedule of a probe.

    Attributes:
      batch_size: over all devices.
      steps_per_epoch: number of full batches in an epoch.
      rate: step -> learning rate.
    """

    batch_size: int
    steps_per_epoch: int
    rate: Schedule


def plan(settings: ProbeSettings, count: int, hosts: int = 1) -> Plan:
    """Computes the batch size and the learning rate schedule of a probe.

    Args:
      settings: of the training.
      count: number of training images.
      hosts: number of hosts that read disjoint shards; the smallest shard limits the batch size.

    Raises:
      UserError: if there are fewer images than devices, or no rate.
    """
    if not settings.learning_rate.base_lr:
        raise UserError(
            "config.learning_rate.base_lr=0 stands for the rate of a run's backbone, and there is "
            "no run here: set a rate."
        )
    devices = jax.device_count()
    batch_size = min(settings.batch_size, count // hosts * hosts) // devices * devices
    if not batch_size:
        raise UserError(f"{count} labelled images are fewer than the {devices} devices.")
    steps = (count // hosts) // (batch_size // hosts)
    rate = optimizer.learning_rate(settings.learning_rate, batch_size, steps, settings.total_epochs)
    return Plan(batch_size, steps, rate)


def train(
    settings: ProbeSettings,
    variants: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray,
    num_classes: int,
    *,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    workdir: str | None = None,
) -> tuple[Classifier, dict[str, float]]:
    """Trains a linear classifier on extracted features.

    The protocol of MoCo (arXiv:1911.05722, section 4.1) and DisCo: SGD with momentum, no weight
    decay, learning rate divided by 10 at epochs 60 and 80 of 100, weights from N(0, 0.01), bias 0.

    Args:
      settings: of the training.
      variants: f32[N, F], or several such arrays, e.g. features of the images and of their mirror
        images. Each read of an image draws one of its variants.
      labels: i32[N].
      num_classes: C.
      test: (f32[M, F], i32[M]) to evaluate every `evaluate_every_epochs`; None: no evaluation.
      workdir: directory of the metrics; None writes none.

    Returns:
      The classifier after the last step, and `Best.result` of the evaluations on `test`.
    """
    variants = [variants] if isinstance(variants, np.ndarray) else list(variants)
    probe_plan = plan(settings, len(labels))
    tx = optimizer.build(settings.optimizer, probe_plan.rate)
    feature_stats = classifier.feature_stats(variants[0]) if settings.normalise else {}
    head = classifier.init(settings.init, variants[0].shape[1], num_classes, settings.seed)
    params = {"classifier": head}
    start = ProbeState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))
    best = Best(probe_plan.steps_per_epoch)

    def eval_fn(step, state):
        return best(step, layer(state, feature_stats).scores(test[0]), test[1])

    def forward(params, state, frozen, batch):
        rows = batch["features"]
        return classifier.logits(params["classifier"], rows, frozen["feature_stats"]), state.stats

    state = fit(
        settings,
        probe_plan,
        classifier.make_step(tx, forward),
        start,
        {"feature_stats": feature_stats},
        batches(variants, labels, probe_plan.batch_size, settings.seed),
        Logger(workdir, tensorboard=False),
        evaluate=eval_fn if test else None,
        evaluate_steps=settings.evaluate_every_epochs * probe_plan.steps_per_epoch,
    )
    return layer(state, feature_stats), best.result


class Best:
    """Tracks the best of several evaluations on the test images.

    The papers select the reported result on the test images, so the best is reported separately
    from the last.

    Attributes:
      result: {"best_top1": percent, "best_epoch"}, {} before the first evaluation.
    """

    def __init__(self, steps_per_epoch: int):
        self.result: dict[str, float] = {}
        self._steps_per_epoch = steps_per_epoch

    def __call__(self, step: int, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Records the top-1 of scores f32[M, C]; returns {"test/top1": percent}."""
        top1 = scores.top_k(logits, labels, 1)
        self.note(step, top1)
        return {"test/top1": top1}

    def note(self, step: int, top1: float) -> None:
        """Records an earlier evaluation."""
        if top1 > self.result.get("best_top1", -1.0):
            self.result = {"best_top1": top1, "best_epoch": step / self._steps_per_epoch}


def layer(state: ProbeState, feature_stats: Mapping[str, np.ndarray]) -> Classifier:
    """Copies the classifier of a state to the host."""
    head = jax.device_get(state.params["classifier"])
    return Classifier(head["kernel"], head["bias"], feature_stats)


def fit(
    settings: ProbeSettings,
    probe_plan: Plan,
    step: Any,
    start: ProbeState,
    frozen: Any,
    batches: Any,
    logger: Logger,
    *,
    evaluate: Evaluate | None = None,
    evaluate_steps: int = 0,
    evaluate_first: int = 0,
    checkpoints: Checkpoints | None = None,
    verbose: bool = False,
) -> ProbeState:
    """Runs the training loop with the durations of an evaluation.

    Args:
      settings: of the training.
      probe_plan: see `plan`.
      step: step of one replica.
      start: the initial state.
      frozen: input of the step that is never updated.
      batches: see `loop.run`.
      logger: destination of the metrics.
      evaluate: called every `evaluate_steps` steps and at the end; None: never.
      evaluate_steps: interval of `evaluate`; 0: never.
      evaluate_first: number of first steps after each of which `evaluate` is called as well.
      checkpoints: destination of the checkpoints; None saves none.
      verbose: whether to print the progress line.
    """
    steps = probe_plan.steps_per_epoch
    return loop.run(
        parallel(step),
        replicate(start),
        replicate(frozen),
        batches,
        loop.Schedule(
            start=int(start.step),
            total=settings.total_epochs * steps,
            steps_per_epoch=steps,
            batch_size=probe_plan.batch_size,
            log_steps=settings.log_every_epochs * steps,
            checkpoint_steps=settings.checkpoint_every_epochs * steps,
            evaluate_steps=evaluate_steps if evaluate else 0,
            evaluate_first=evaluate_first if evaluate else 0,
            verbose=verbose,
        ),
        logger,
        checkpoints,
        evaluate=evaluate,
    )


def batches(
    variants: Sequence[np.ndarray], labels: np.ndarray, batch_size: int, seed: int
) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Yields this host's part of shuffled batches, and their place in the data.

    Every epoch has a new permutation; an incomplete last batch is dropped.
    """
    host, hosts = jax.process_index(), jax.process_count()
    devices, epoch, per_host = jax.local_device_count(), 0, batch_size // hosts
    while True:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(labels))
        variant_ids = rng.integers(0, len(variants), len(labels))
        for i in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[i + host * per_host : i + (host + 1) * per_host]
            features = variants[0][rows]
            for variant in range(1, len(variants)):
                selected = variant_ids[rows] == variant
                features[selected] = variants[variant][rows[selected]]
            tree = {"features": features, "labels": labels[rows]}
            yield to_devices(tree, devices), (epoch, i + batch_size)
        epoch += 1
