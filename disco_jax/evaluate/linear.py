"""The linear probe: one linear layer on features extracted once, through the one loop."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from disco_jax.data.pipeline import to_devices
from disco_jax.errors import UserError
from disco_jax.evaluate import classifier, scores
from disco_jax.evaluate.classifier import Classifier, ProbeState
from disco_jax.ops.schedules import Schedule
from disco_jax.train import loop, optimizer
from disco_jax.train.checkpoint import Checkpoints
from disco_jax.train.metrics import Logger
from disco_jax.train.state import everywhere
from disco_jax.train.step import parallel

# (step, state) -> metrics of the test images.
Evaluate = Callable[[int, ProbeState], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a probe trains.

    Attributes:
      batch_size: over all devices.
      steps_per_epoch: whole batches an epoch.
      rate: step -> learning rate.
    """

    batch_size: int
    steps_per_epoch: int
    rate: Schedule


def plan(config: ConfigDict, count: int, hosts: int = 1) -> Plan:
    """Batch and learning rate of a probe.

    Args:
      config: see `common.classification`.
      count: training images.
      hosts: that read images of their own; a batch is then at most what the smallest share gives.

    Raises:
      UserError: fewer images than devices.
    """
    devices = jax.device_count()
    batch_size = min(config.batch_size, count // hosts * hosts) // devices * devices
    if not batch_size:
        raise UserError(f"{count} labelled images are fewer than the {devices} devices.")
    steps = (count // hosts) // (batch_size // hosts)
    rate = optimizer.learning_rate(config.learning_rate, batch_size, steps, config.total_epochs)
    return Plan(batch_size, steps, rate)


def train(
    config: ConfigDict,
    variants: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray,
    num_classes: int,
    *,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    workdir: str | None = None,
) -> tuple[Classifier, dict[str, float]]:
    """Trains the layer.

    MoCo (arXiv:1911.05722, section 4.1) and DisCo: SGD with momentum, no weight decay, the rate
    divided by 10 at epochs 60 and 80 of 100; weights from N(0, 0.01), bias 0.

    Args:
      config: see `configs/linear.py`.
      variants: f32[N, F], or several of them: of the images and of their mirror images. Each time
        an image is read, one of its variants is drawn.
      labels: i32[N].
      num_classes: C.
      test: (f32[M, F], i32[M]) to look at every `evaluate_every_epochs`; None: never.
      workdir: where metrics go; None: nowhere.

    Returns:
      The layer after the last step, and `Best.result` of the looks at `test`.
    """
    variants = [variants] if isinstance(variants, np.ndarray) else list(variants)
    how = plan(config, len(labels))
    tx = optimizer.build(config.optimizer, how.rate)
    standard = classifier.standard(variants[0]) if config.normalise else {}
    head = classifier.init(config.init, variants[0].shape[1], num_classes, config.seed)
    params = {"classifier": head}
    start = ProbeState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))
    best = Best(how.steps_per_epoch)

    def look(step, state):
        return best(step, layer(state, standard).scores(test[0]), test[1])

    def forward(params, state, frozen, batch):
        rows = batch["features"]
        return classifier.logits(params["classifier"], rows, frozen["standard"]), state.stats

    state = fit(
        config,
        how,
        classifier.make_step(tx, forward),
        start,
        {"standard": standard},
        batches(variants, labels, how.batch_size, config.seed),
        Logger(workdir, tensorboard=False),
        evaluate=look if test else None,
        evaluate_steps=config.evaluate_every_epochs * how.steps_per_epoch,
    )
    return layer(state, standard), best.result


class Best:
    """Remembers the best of many looks at the test images.

    The papers choose by the very test images that they report on, so the best is kept apart from
    the last.

    Attributes:
      result: {"best_top1": percent, "best_epoch"}, {} before the first look.
    """

    def __init__(self, steps_per_epoch: int):
        self.result: dict[str, float] = {}
        self._steps_per_epoch = steps_per_epoch

    def __call__(self, step: int, found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """{"test/top1"} in percent, of scores f32[M, C]."""
        top1 = scores.top_k(found, labels, 1)
        self.note(step, top1)
        return {"test/top1": top1}

    def note(self, step: int, top1: float) -> None:
        """Takes a look into account that was had before."""
        if top1 > self.result.get("best_top1", -1.0):
            self.result = {"best_top1": top1, "best_epoch": step / self._steps_per_epoch}


def layer(state: ProbeState, standard: Mapping[str, np.ndarray]) -> Classifier:
    """The layer of a state, on the host."""
    head = jax.device_get(state.params["classifier"])
    return Classifier(head["kernel"], head["bias"], standard)


def fit(
    config: ConfigDict,
    how: Plan,
    step: Any,
    start: ProbeState,
    frozen: Any,
    batches: Any,
    logger: Logger,
    *,
    evaluate: Evaluate | None = None,
    evaluate_steps: int = 0,
    checkpoints: Checkpoints | None = None,
    verbose: bool = False,
) -> ProbeState:
    """The loop with the durations of an evaluation's config.

    Args:
      config: see `common.classification`.
      how: see `plan`.
      step: of one replica.
      start: the state to begin with.
      frozen: what the step reads and never changes.
      batches: see `loop.run`.
      logger: for the metrics.
      evaluate: called every `evaluate_steps` steps and at the end; None: never.
      evaluate_steps: 0: never.
      checkpoints: None saves nothing.
      verbose: whether to print the progress line.
    """
    steps = how.steps_per_epoch
    return loop.run(
        parallel(step),
        everywhere(start),
        everywhere(frozen),
        batches,
        loop.Schedule(
            start=int(start.step),
            total=config.total_epochs * steps,
            steps_per_epoch=steps,
            batch_size=how.batch_size,
            log_steps=config.log_every_epochs * steps,
            checkpoint_steps=config.checkpoint_every_epochs * steps,
            evaluate_steps=evaluate_steps if evaluate else 0,
            verbose=verbose,
        ),
        logger,
        checkpoints,
        evaluate=evaluate,
    )


def batches(
    variants: Sequence[np.ndarray], labels: np.ndarray, batch_size: int, seed: int
) -> Iterator[tuple[Any, tuple[int, int]]]:
    """A fresh shuffle each epoch, the remainder dropped; of each batch, this host's part."""
    host, hosts = jax.process_index(), jax.process_count()
    devices, epoch, own = jax.local_device_count(), 0, batch_size // hosts
    while True:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(labels))
        kinds = rng.integers(0, len(variants), len(labels))
        for i in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[i + host * own : i + (host + 1) * own]
            chosen = variants[0][rows]
            for kind in range(1, len(variants)):
                other = kinds[rows] == kind
                chosen[other] = variants[kind][rows[other]]
            tree = {"features": chosen, "labels": labels[rows]}
            yield to_devices(tree, devices), (epoch, i + batch_size)
        epoch += 1
