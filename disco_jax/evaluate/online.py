"""Supervised training on images as they are read: probes with augmentation, and fine-tuning."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax import errors
from disco_jax.data import pipeline, views
from disco_jax.data.contract import Position, Source
from disco_jax.data.presets import PRESETS
from disco_jax.evaluate import classifier, features, linear
from disco_jax.evaluate.classifier import Classifier, ProbeState
from disco_jax.evaluate.features import TrainedModel
from disco_jax.evaluate.probe_settings import ProbeSettings
from disco_jax.models.layers.norm import MODES
from disco_jax.ops.collectives import positions
from disco_jax.run import unreadable, workdir
from disco_jax.run.checkpoint import Checkpoints
from disco_jax.run.metrics import Logger
from disco_jax.train import optimizer
from disco_jax.train.state import shard_batch

LAYERS = ("classifier", "all")
# Settings that may change when a training resumes, because they do not affect the weights.
_CHANGEABLE = (
    "log_every_epochs",
    "checkpoint_every_epochs",
    "evaluate_every_epochs",
    "extract_batch_size",
    "report",
    "protocol",
    "student",
)
# Fields of `augment` that come from the run instead of the preset.
_RUN_FIELDS = ("size", "interpolation", "antialias", "mean", "std")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Network with a trained classifier, whose predictions are distilled.

    Attributes:
      trained: the network.
      classifier: its linear classifier.
      output: network output that the classifier reads.
      blocks: number of last ViT blocks, see `Encoder.read`.
    """

    trained: TrainedModel
    classifier: Classifier
    output: str
    blocks: int


# (step, network, classifier) -> metrics; see `train`.
EvalFn = Callable[[int, TrainedModel, Classifier], Mapping[str, float]]


def check(settings: ProbeSettings, trained: TrainedModel) -> None:
    """Checks settings that would fail, or have no effect, only after hours of training.

    Raises:
      UserError: names the invalid setting.
    """
    if settings.layers not in LAYERS:
        raise errors.unknown("config.layers", settings.layers, LAYERS)
    if settings.norm not in MODES[:2] + MODES[3:]:
        raise errors.unknown("config.norm", settings.norm, ("running", "sync", "local"))
    if settings.layers == "classifier" and settings.norm != "running":
        raise errors.UserError(
            f"config.norm={settings.norm!r} updates the network's statistics, but the network is "
            "frozen: set config.norm=running or config.layers=all."
        )
    if settings.layers == "all" and settings.normalise:
        raise errors.UserError(
            "config.normalise needs fixed features, but config.layers=all changes them. Set "
            "it to False."
        )
    classifier.check_distill(settings.distill)
    features.check_outputs(trained, (settings.output,), settings.blocks)


def train(
    settings: ProbeSettings,
    trained: TrainedModel,
    source: Source,
    folder: str | None,
    *,
    teacher: Teacher | None = None,
    eval_fn: EvalFn | None = None,
    eval_every_steps: int = 0,
    eval_first_steps: int = 0,
) -> tuple[TrainedModel, Classifier]:
    """Trains a linear classifier on top of a network, or both together.

    An interrupted training resumes if it is started again with the same `folder`.

    Args:
      settings: of the training.
      trained: the network; its settings define how images are read.
      source: labelled images.
      folder: directory for config, metrics and checkpoints; None writes nothing.
      teacher: distilled in addition to the labels, if `config.distill.weight` is set.
      eval_fn: called every `eval_every_steps` steps and at the end; None: never.
      eval_every_steps: interval of `eval_fn`; 0: never.
      eval_first_steps: number of first steps after each of which `eval_fn` is called as well.

    Returns:
      The network, fine-tuned with `config.layers="all"`, and the classifier.

    Raises:
      UserError: if an image has no label, or `folder` belongs to other settings.
      NumericError, Preempted: see `loop.run`.
    """
    tx = optimizer.build(settings.optimizer, plan(settings, trained, source).rate)
    recipe = views_of(trained)
    feature_stats = feature_stats_of(settings, trained, source)
    step = classifier.make_step(
        tx,
        _forward(settings, trained, recipe),
        head_rate=settings.head_rate,
        distill=settings.distill,
        teach=_teach(settings, teacher, recipe),
    )
    frozen: dict[str, Any] = {"feature_stats": feature_stats, "teacher": _teacher_arrays(teacher)}
    if settings.layers == "classifier":
        frozen["network"] = trained.variables

    def evaluate(step, state):
        return eval_fn(step, network(trained, state), linear.layer(state, feature_stats))

    state = fit(
        settings,
        trained,
        source,
        folder,
        step,
        _start(settings, trained, features.classes(source, trained.settings.data.train_split), tx),
        frozen,
        evaluate=evaluate if eval_fn else None,
        evaluate_steps=eval_every_steps,
        evaluate_first=eval_first_steps,
    )
    return network(trained, state), linear.layer(state, feature_stats)


def fit(
    settings: ProbeSettings,
    trained: TrainedModel,
    source: Source,
    folder: str | None,
    step: Any,
    start: ProbeState,
    frozen: Any,
    *,
    evaluate: linear.Evaluate | None = None,
    evaluate_steps: int = 0,
    evaluate_first: int = 0,
) -> ProbeState:
    """Runs `linear.fit` on labelled crops as they are read; resumes an interrupted training.

    Args:
      settings: of the training.
      trained: its settings define how images are read.
      source: labelled images.
      folder: see `train`.
      step: step of one replica, on {"images", "labels", and further arrays from the source}.
      start: the state at step 0.
      frozen: input of the step that is never updated.
      evaluate: see `linear.fit`.
      evaluate_steps: see `linear.fit`.
      evaluate_first: see `linear.fit`.
    """
    probe_plan = plan(settings, trained, source)
    recipe = views_of(trained)
    with _claimed_checkpoints(folder, settings, trained, source) as checkpoints:
        if folder is not None:
            unreadable.keep(source, folder)
        state, position = _resume_or_start(checkpoints, start)
        if int(state.step) >= settings.total_epochs * probe_plan.steps_per_epoch:
            return state
        with (
            contextlib.closing(
                Logger(folder, tensorboard=_tensorboard(trained, folder), step=int(state.step))
            ) as logger,
            _prefetched_crops(
                source, trained, recipe, probe_plan, settings.seed, position
            ) as batches,
        ):
            return linear.fit(
                settings,
                probe_plan,
                step,
                state,
                frozen,
                batches,
                logger,
                evaluate=evaluate,
                evaluate_steps=evaluate_steps,
                evaluate_first=evaluate_first,
                checkpoints=checkpoints,
                verbose=folder is not None,
            )


def _tensorboard(trained: TrainedModel, folder: str | None) -> bool:
    """Returns the run's setting, but False in a bucket, where TensorBoard needs TensorFlow."""
    return trained.settings.log.tensorboard and "://" not in str(folder)


def plan(settings: ProbeSettings, trained: TrainedModel, source: Source) -> linear.Plan:
    """Calls `linear.plan` for the run's training split."""
    count = source.count(trained.settings.data.train_split)
    return linear.plan(settings, count, jax.process_count())


def network(trained: TrainedModel, state: ProbeState) -> TrainedModel:
    """Returns the network of a state: `trained` itself if it is frozen."""
    if "network" not in state.params:
        return trained
    variables = {"params": state.params["network"], "batch_stats": state.stats}
    return dataclasses.replace(trained, variables=jax.device_get(variables))


def views_of(trained: TrainedModel) -> views.Recipe:
    """Builds the recipe of random crops and flips, with the network's normalization."""
    augment = dataclasses.asdict(trained.settings.augment)
    preset = {**PRESETS["linear"], **{field: augment[field] for field in _RUN_FIELDS}}
    return views.build(preset, 1)


def _start(settings: ProbeSettings, trained: TrainedModel, classes: int, tx: Any) -> ProbeState:
    """Creates the state at step 0, on the host."""
    head = classifier.init(settings.init, width(settings, trained), classes, settings.seed)
    params: dict[str, Any] = {"classifier": head}
    stats: Any = {}
    if settings.layers == "all":
        params["network"] = trained.variables["params"]
        stats = trained.variables["batch_stats"]
    return ProbeState(jnp.zeros((), jnp.int32), params, stats, jax.device_get(tx.init(params)))


def width(settings: ProbeSettings, trained: TrainedModel) -> int:
    """Returns F, the width of the network output that `config.output` selects."""
    size = trained.settings.augment.size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    read = _reader(trained, settings.output, settings.blocks)
    return jax.eval_shape(lambda v, x: read(v, x)[0], trained.variables, images).shape[-1]


def _reader(trained: TrainedModel, output: str, blocks: int) -> Callable[..., tuple[Array, Any]]:
    """Builds (variables, images, norm, rngs) -> (output, updated BatchNorm statistics)."""

    def read(variables, images, norm="running", rngs=None):
        outputs, updated = trained.encoder.apply(
            variables,
            images,
            norm=norm,
            outputs=(output,),
            blocks=blocks,
            method="read",
            mutable=["batch_stats"],
            rngs=rngs or {},
        )
        return outputs[output], updated.get("batch_stats", variables["batch_stats"])

    return read


def rows_of(settings: ProbeSettings, trained: TrainedModel) -> Callable[..., Array]:
    """Builds (state, frozen, batch) -> f32[B, F], the frozen network's output for this step."""
    read, recipe = _reader(trained, settings.output, settings.blocks), views_of(trained)

    def rows(state, frozen, batch):
        images = _augment(recipe, state, batch, settings.seed)
        return jax.lax.stop_gradient(read(frozen["network"], images)[0])

    return rows


def _forward(
    settings: ProbeSettings, trained: TrainedModel, recipe: views.Recipe
) -> classifier.Forward:
    """Builds the function images -> logits, with the network frozen or trained."""
    read = _reader(trained, settings.output, settings.blocks)
    frozen_rows = rows_of(settings, trained)

    def forward(params, state, frozen, batch):
        if "network" in params:
            images = _augment(recipe, state, batch, settings.seed)
            variables = {"params": params["network"], "batch_stats": state.stats}
            drops = {"dropout": jax.random.fold_in(jax.random.key(settings.seed + 1), state.step)}
            rows, stats = read(variables, images, settings.norm, drops)
        else:
            rows, stats = frozen_rows(state, frozen, batch), state.stats
        return classifier.logits(params["classifier"], rows, frozen["feature_stats"]), stats

    return forward


def _teach(settings: ProbeSettings, teacher: Teacher | None, recipe: views.Recipe) -> Any:
    """Builds the function that computes the teacher's logits, or returns None without a teacher.

    The teacher sees the same crops as the student, with its own normalization.
    """
    if teacher is None:
        return None
    read = _reader(teacher.trained, teacher.output, teacher.blocks)
    mean, std = teacher.trained.settings.augment.normalization
    operations = dataclasses.replace(recipe.photometric_ops[0], mean=mean, std=std)
    recipe = views.Recipe(recipe.crops, (operations,))

    def teach(state, frozen, batch):
        teacher_arrays = frozen["teacher"]
        rows, _ = read(teacher_arrays["network"], _augment(recipe, state, batch, settings.seed))
        return classifier.logits(
            teacher_arrays["classifier"], rows, teacher_arrays["feature_stats"]
        )

    return teach


def _teacher_arrays(teacher: Teacher | None) -> dict[str, Any]:
    if teacher is None:
        return {}
    layer = teacher.classifier
    return {
        "network": teacher.trained.variables,
        "classifier": {"kernel": layer.kernel, "bias": layer.bias},
        "feature_stats": dict(layer.feature_stats),
    }


def _augment(
    recipe: views.Recipe, state: ProbeState, batch: Mapping[str, Array], seed: int
) -> Array:
    """Returns this step's images, f32[B, S, S, 3], after random flips and normalization.

    The result does not depend on the number of devices.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    images = batch["images"]
    return recipe.photometric({0: images}, key, positions(images.shape[0]))[0]


def feature_stats_of(
    settings: ProbeSettings, trained: TrainedModel, source: Source
) -> dict[str, np.ndarray]:
    """Returns `classifier.feature_stats` of the training images, {} without `config.normalise`."""
    if not settings.normalise:
        return {}
    split, output = trained.settings.data.train_split, settings.output
    extracted = features.of_split(
        trained, source, split, settings.extract_batch_size, (output,), settings.blocks
    )
    return classifier.feature_stats(getattr(extracted, output))


@contextlib.contextmanager
def _prefetched_crops(source, trained, recipe, probe_plan, seed, position):
    """Yields an iterator over batches of labelled crops on the devices, prefetched."""
    data, devices = trained.settings.data, jax.local_device_count()

    def lay_out(batch):
        if (batch.labels < 0).any():
            raise features.unlabelled(source, data.train_split)
        tree = {"images": batch.views[0], "labels": batch.labels, **batch.aux}
        position_in_data = (batch.position.epoch, batch.position.offset)
        return shard_batch(pipeline.to_devices(tree, devices)), position_in_data

    crops = source.train(
        data.train_split,
        dict(enumerate(recipe.crops)),
        probe_plan.batch_size // jax.process_count(),
        seed,
        position,
        pipeline.unreadable_limit(data, source, data.train_split),
    )
    with pipeline.Prefetcher(crops, transform=lay_out) as batches:
        yield batches


@contextlib.contextmanager
def _claimed_checkpoints(
    folder: str | None, settings: ProbeSettings, trained: TrainedModel, source: Source
):
    """Claims `folder` for these settings of this network; yields its `Checkpoints`, or None."""
    if folder is None:
        yield None
        return
    values = dataclasses.asdict(settings)
    fixed = {name: value for name, value in values.items() if name not in _CHANGEABLE}
    data = trained.settings.data
    sections = {"evaluation": fixed, "step": trained.step, "data": dataclasses.asdict(data)}
    images = functools.partial(source.fingerprint, data.train_split)
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(
                workdir.claim(folder, workdir.record(sections), images=images)
            )
        except errors.UserError as error:
            hint = "Set another --config.name to use another directory."
            raise errors.UserError(f"{error} {hint}") from None
        yield stack.enter_context(contextlib.closing(Checkpoints(str(path), keep=1)))


def _resume_or_start(
    checkpoints: Checkpoints | None, start: ProbeState
) -> tuple[ProbeState, Position]:
    """Returns the newest intact state and this host's place in the data, or the start."""
    restored = checkpoints and checkpoints.restore(start)
    if not restored:
        if checkpoints:
            checkpoints.check_none_lost()
        return start, Position.start()
    state, meta = restored
    hosts = meta["position"]
    if len(hosts) == jax.process_count():
        return state, Position(*hosts[jax.process_index()])
    return state, Position(max(epoch for epoch, _ in hosts), 0)  # other shards: restart the epoch
