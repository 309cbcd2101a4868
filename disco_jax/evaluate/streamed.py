"""Training with labels on images as they are read: probes with augmentation, and fine-tuning."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data import pipeline, views
from disco_jax.data.base import Position, Source
from disco_jax.data.stacks import STACKS
from disco_jax.evaluate import classifier, features, linear
from disco_jax.evaluate.classifier import Classifier, ProbeState
from disco_jax.evaluate.features import Trained
from disco_jax.models.layers.norm import MODES
from disco_jax.ops.collectives import positions
from disco_jax.train import optimizer, unreadable, workdir
from disco_jax.train.checkpoint import Checkpoints
from disco_jax.train.metrics import Logger
from disco_jax.train.state import apart

LAYERS = ("classifier", "all")
# Settings that may change when a training goes on: they do not change what is learned.
_FREE = (
    "log_every_epochs",
    "checkpoint_every_epochs",
    "evaluate_every_epochs",
    "extract_batch_size",
    "report",
)
# Fields of `augment` that are the run's own, whatever the stack.
_OF_RUN = ("size", "interpolation", "antialias", "mean", "std")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network with a trained layer, whose classes are taught.

    Attributes:
      trained: the network.
      classifier: its layer.
      output: what of the network the layer reads.
      blocks: of a ViT, see `Encoder.read`.
    """

    trained: Trained
    classifier: Classifier
    output: str
    blocks: int


# (step, network, layer) -> metrics; see `train`.
Look = Callable[[int, Trained, Classifier], Mapping[str, float]]


def check(config: ConfigDict, trained: Trained) -> None:
    """Refuses settings that would fail, or do nothing, after hours of reading.

    Raises:
      UserError: names the setting.
    """
    if config.layers not in LAYERS:
        raise errors.unknown("config.layers", config.layers, LAYERS)
    if config.norm not in MODES[:2] + MODES[3:]:
        raise errors.unknown("config.norm", config.norm, ("running", "sync", "local"))
    if config.layers == "classifier" and config.norm != "running":
        raise errors.UserError(
            f"config.norm={config.norm!r}, but the network is frozen: set it to running, or "
            "config.layers to all."
        )
    if config.layers == "all" and config.normalise:
        raise errors.UserError(
            "config.normalise takes statistics of features that stay as they are; with "
            "config.layers=all they do not. Set it to False."
        )
    classifier.check_distill(config.distill)
    features.check_outputs(trained, (config.output,), config.blocks)


def train(
    config: ConfigDict,
    trained: Trained,
    source: Source,
    folder: str | None,
    *,
    teacher: Teacher | None = None,
    look: Look | None = None,
    look_steps: int = 0,
) -> tuple[Trained, Classifier]:
    """Trains a layer on top of a network, or both together.

    A training that was stopped goes on where it was if `folder` is the same.

    Args:
      config: see `common.classification`.
      trained: the network; its config says how images are read.
      source: labelled images.
      folder: for config, metrics and checkpoints; None keeps nothing.
      teacher: what teaches beside the labels, if `config.distill.weight` is set.
      look: called every `look_steps` steps and at the end; None: never.
      look_steps: 0: never.

    Returns:
      The network, fine-tuned with `config.layers="all"`, and the layer.

    Raises:
      UserError: an image has no label, or `folder` is of other settings.
      NumericError, Preempted: see `loop.run`.
    """
    tx = optimizer.build(config.optimizer, plan(config, trained, source).rate)
    recipe = views_of(trained)
    standard = standard_of(config, trained, source)
    step = classifier.make_step(
        tx,
        _forward(config, trained, recipe),
        head_rate=config.head_rate,
        distill=config.distill,
        teach=_teach(config, teacher, recipe),
    )
    frozen: dict[str, Any] = {"standard": standard, "teacher": _frozen(teacher)}
    if config.layers == "classifier":
        frozen["network"] = trained.variables

    def evaluate(step, state):
        return look(step, network(trained, state), linear.layer(state, standard))

    state = fit(
        config,
        trained,
        source,
        folder,
        step,
        _start(config, trained, features.classes(source, trained.config.data.train_split), tx),
        frozen,
        evaluate=evaluate if look else None,
        evaluate_steps=look_steps,
    )
    return network(trained, state), linear.layer(state, standard)


def fit(
    config: ConfigDict,
    trained: Trained,
    source: Source,
    folder: str | None,
    step: Any,
    start: ProbeState,
    frozen: Any,
    *,
    evaluate: linear.Evaluate | None = None,
    evaluate_steps: int = 0,
) -> ProbeState:
    """`linear.fit` on labelled crops as they are read, from where it was stopped, if it was.

    Args:
      config: see `common.classification`.
      trained: its config says how images are read.
      source: labelled images.
      folder: see `train`.
      step: of one replica, on {"images", "labels", and what the source gives beside}.
      start: the state at step 0.
      frozen: what the step reads and never changes.
      evaluate: see `linear.fit`.
      evaluate_steps: likewise.
    """
    how = plan(config, trained, source)
    recipe = views_of(trained)
    with _kept(folder, config, trained, source) as checkpoints:
        if folder is not None:
            unreadable.keep(source, folder)
        state, position = _resumed(checkpoints, start)
        if int(state.step) >= config.total_epochs * how.steps_per_epoch:
            return state
        with (
            contextlib.closing(
                Logger(folder, tensorboard=_tensorboard(trained, folder), step=int(state.step))
            ) as logger,
            _reading(source, trained, recipe, how, config.seed, position) as batches,
        ):
            return linear.fit(
                config,
                how,
                step,
                state,
                frozen,
                batches,
                logger,
                evaluate=evaluate,
                evaluate_steps=evaluate_steps,
                checkpoints=checkpoints,
                verbose=folder is not None,
            )


def _tensorboard(trained: Trained, folder: str | None) -> bool:
    """As the run that is evaluated has it; in a bucket not, as that needs TensorFlow."""
    return trained.config.log.tensorboard and "://" not in str(folder)


def plan(config: ConfigDict, trained: Trained, source: Source) -> linear.Plan:
    """See `linear.plan`."""
    count = source.count(trained.config.data.train_split)
    return linear.plan(config, count, jax.process_count())


def network(trained: Trained, state: ProbeState) -> Trained:
    """The network of a state: `trained` itself where it is frozen."""
    if "network" not in state.params:
        return trained
    variables = {"params": state.params["network"], "batch_stats": state.stats}
    return dataclasses.replace(trained, variables=jax.device_get(variables))


def views_of(trained: Trained) -> views.Recipe:
    """Random crops and flips, prepared for the network."""
    augment = trained.config.augment
    settings = {**STACKS["linear"], **{field: augment[field] for field in _OF_RUN}}
    return views.build(settings, 1)


def _start(config: ConfigDict, trained: Trained, classes: int, tx: Any) -> ProbeState:
    """The state at step 0, on the host."""
    head = classifier.init(config.init, width(config, trained), classes, config.seed)
    params: dict[str, Any] = {"classifier": head}
    stats: Any = {}
    if config.layers == "all":
        params["network"] = trained.variables["params"]
        stats = trained.variables["batch_stats"]
    return ProbeState(jnp.zeros((), jnp.int32), params, stats, jax.device_get(tx.init(params)))


def width(config: ConfigDict, trained: Trained) -> int:
    """F, the columns of what is asked of the network."""
    size = trained.config.augment.size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    read = _reader(trained, config.output, config.blocks)
    return jax.eval_shape(lambda v, x: read(v, x)[0], trained.variables, images).shape[-1]


def _reader(trained: Trained, output: str, blocks: int) -> Callable[..., tuple[Array, Any]]:
    """(variables, images, norm, rngs) -> what is asked of the network, new statistics."""

    def read(variables, images, norm="running", rngs=None):
        made, new = trained.encoder.apply(
            variables,
            images,
            norm=norm,
            outputs=(output,),
            blocks=blocks,
            method="read",
            mutable=["batch_stats"],
            rngs=rngs or {},
        )
        return made[output], new.get("batch_stats", variables["batch_stats"])

    return read


def rows_of(config: ConfigDict, trained: Trained) -> Callable[..., Array]:
    """(state, frozen, batch) -> f32[B, F]: what the frozen network makes of this step's crops."""
    read, recipe = _reader(trained, config.output, config.blocks), views_of(trained)

    def rows(state, frozen, batch):
        images = _seen(recipe, state, batch, config.seed)
        return jax.lax.stop_gradient(read(frozen["network"], images)[0])

    return rows


def _forward(config: ConfigDict, trained: Trained, recipe: views.Recipe) -> classifier.Forward:
    """Images -> logits, the network frozen or not."""
    read = _reader(trained, config.output, config.blocks)
    frozen_rows = rows_of(config, trained)

    def forward(params, state, frozen, batch):
        if "network" in params:
            images = _seen(recipe, state, batch, config.seed)
            variables = {"params": params["network"], "batch_stats": state.stats}
            drops = {"dropout": jax.random.fold_in(jax.random.key(config.seed + 1), state.step)}
            rows, stats = read(variables, images, config.norm, drops)
        else:
            rows, stats = frozen_rows(state, frozen, batch), state.stats
        return classifier.logits(params["classifier"], rows, frozen["standard"]), stats

    return forward


def _teach(config: ConfigDict, teacher: Teacher | None, recipe: views.Recipe) -> Any:
    """The teacher's logits of the very crops that the student sees, normalised its own way."""
    if teacher is None:
        return None
    read = _reader(teacher.trained, teacher.output, teacher.blocks)
    mean, std = (tuple(teacher.trained.config.augment[name]) for name in ("mean", "std"))
    operations = dataclasses.replace(recipe.photometric_ops[0], mean=mean, std=std)
    recipe = views.Recipe(recipe.crops, (operations,))

    def teach(state, frozen, batch):
        given = frozen["teacher"]
        rows, _ = read(given["network"], _seen(recipe, state, batch, config.seed))
        return classifier.logits(given["classifier"], rows, given["standard"])

    return teach


def _frozen(teacher: Teacher | None) -> dict[str, Any]:
    if teacher is None:
        return {}
    layer = teacher.classifier
    return {
        "network": teacher.trained.variables,
        "classifier": {"kernel": layer.kernel, "bias": layer.bias},
        "standard": dict(layer.standard),
    }


def _seen(recipe: views.Recipe, state: ProbeState, batch: Mapping[str, Array], seed: int) -> Array:
    """f32[B, S, S, 3]: this step's images, mirrored or not; the same on any number of devices."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    images = batch["images"]
    return recipe.photometric({0: images}, key, positions(images.shape[0]))[0]


def standard_of(config: ConfigDict, trained: Trained, source: Source) -> dict[str, np.ndarray]:
    """`classifier.standard` of the training images, if `config.normalise` asks for it."""
    if not config.normalise:
        return {}
    split, output = trained.config.data.train_split, config.output
    found = features.of_split(
        trained, source, split, config.extract_batch_size, (output,), config.blocks
    )
    return classifier.standard(getattr(found, output))


@contextlib.contextmanager
def _reading(source, trained, recipe, how, seed, position):
    """Batches of labelled crops on the devices, read ahead."""
    data, devices = trained.config.data, jax.local_device_count()

    def lay_out(batch):
        if (batch.labels < 0).any():
            raise features.unlabelled(source, data.train_split)
        tree = {"images": batch.views[0], "labels": batch.labels, **batch.aux}
        where = (batch.position.epoch, batch.position.offset)
        return apart(pipeline.to_devices(tree, devices)), where

    crops = source.train(
        data.train_split,
        dict(enumerate(recipe.crops)),
        how.batch_size // jax.process_count(),
        seed,
        position,
        pipeline.unreadable_limit(data, source, data.train_split),
    )
    with pipeline.Prefetcher(crops, transform=lay_out) as batches:
        yield batches


@contextlib.contextmanager
def _kept(folder: str | None, config: ConfigDict, trained: Trained, source: Source):
    """The checkpoints in `folder`, which belongs to these settings of this network alone."""
    if folder is None:
        yield None
        return
    learned = ConfigDict({name: config[name] for name in config if name not in _FREE})
    data = trained.config.data
    whole = ConfigDict({"evaluation": learned, "step": trained.step, "data": data})
    images = functools.partial(source.fingerprint, data.train_split)
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(workdir.claim(folder, whole, images=images))
        except errors.UserError as error:
            hint = "Another --config.name takes another directory."
            raise errors.UserError(f"{error} {hint}") from None
        yield stack.enter_context(contextlib.closing(Checkpoints(str(path), keep=1)))


def _resumed(checkpoints: Checkpoints | None, start: ProbeState) -> tuple[ProbeState, Position]:
    """The newest good checkpoint and this host's place in the data, or the start."""
    restored = checkpoints and checkpoints.restore(start)
    if not restored:
        if checkpoints:
            checkpoints.check_none_lost()
        return start, Position.start()
    state, meta = restored
    hosts = meta["position"]
    if len(hosts) == jax.process_count():
        return state, Position(*hosts[jax.process_index()])
    return state, Position(max(epoch for epoch, _ in hosts), 0)  # other shards: the epoch anew
