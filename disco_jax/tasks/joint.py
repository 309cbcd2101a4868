"""Train several students side by side: one look at the images and one teacher for all of them."""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data import pipeline
from disco_jax.data.base import Source
from disco_jax.evaluate import monitor
from disco_jax.methods.base import Method
from disco_jax.nested import flatten
from disco_jax.report import build
from disco_jax.tasks import pretrain
from disco_jax.tasks.prepare import Prepared, prepare, starting
from disco_jax.train import checkpoint, health, joint, loop, state, step, unreadable
from disco_jax.train.goodput import Goodput
from disco_jax.train.metrics import Logger
from disco_jax.train.workdir import claim

# What students that train together may each have of their own.
OWN = (
    "name",
    "student.",
    "momentum.",
    "objectives.",
    "optimizer.",
    "learning_rate.",
    "health.",
)


def key(config: ConfigDict, method: Method) -> str:
    """Runs with the same key can train together.

    Args:
      config: of a pretraining run, resolved.
      method: what `methods.build` made of it.
    """
    told: dict[str, Any] = {"config": _shared(config)}
    network, views = method.networks.get("teacher"), method.plan.get("teacher", ())
    if network is not None:
        told["teacher"] = repr(network)
        # What a view comes out as depends on others that share its batch statistics, and on how it
        # was mixed.
        if network.grouped and network.norm != "running":
            told["views"] = views
        if any(view in o.makes for o in method.objectives.values() for view in views):
            told["mixed"] = [repr(o) for o in method.objectives.values() if o.makes]
    return json.dumps(told, sort_keys=True, default=str)


def groups(keys: Mapping[str, str], most: int) -> list[list[str]]:
    """Names of runs that can train together, at most so many in one step, in their order.

    Args:
      keys: name -> `key` of a run.
      most: 1 or more.
    """
    by_key: dict[str, list[str]] = {}
    for name, one in keys.items():
        by_key.setdefault(one, []).append(name)
    return [names[i : i + most] for names in by_key.values() for i in range(0, len(names), most)]


def _shared(config: ConfigDict) -> dict[str, Any]:
    fields = flatten(json.loads(config.to_json_best_effort()))
    return {name: value for name, value in fields.items() if not name.startswith(OWN)}


def run(
    configs: Mapping[str, ConfigDict],
    workdirs: Mapping[str, str],
    source: Source | None = None,
) -> dict[str, Any]:
    """Trains several configs to their last step; each run's directory is as if it ran alone.

    Args:
      configs: name -> config of a pretraining run; they differ in the fields of `OWN` alone.
      workdirs: name -> the run's directory; they hold checkpoints of the same steps, or none.
      source: images; None opens `config.data`.

    Returns:
      {"step", "seconds"}.

    Raises:
      UserError: a setting will not do, or the runs cannot share images and teacher.
      joint.Diverged: some of the runs are not finite; the others can go on without them.
      NumericError, Preempted: see `loop.run`.
    """
    started = time.monotonic()
    prepared = _prepared(configs, source)
    ready = {name: starting(one, workdirs[name]) for name, one in prepared.items()}
    paths = {name: epath.Path(workdirs[name]) for name in ready}
    first = next(iter(ready))
    pretrain.warn_if_dark(ready[first])
    with contextlib.ExitStack() as held:
        for name, one in ready.items():
            held.enter_context(claim(str(paths[name]), one.config, (), pretrain.images_of(one)))
        others = [str(path) for name, path in paths.items() if name != first]
        goodput = held.enter_context(
            contextlib.closing(Goodput(str(paths[first]), started, also=others))
        )
        unreadable.keep(ready[first].source, paths[first])
        checkpoints = held.enter_context(
            contextlib.closing(joint.JointCheckpoints(_checkpoints(ready, paths)))
        )
        begin, position = pretrain.resume(
            checkpoints, {name: pretrain.fresh(one) for name, one in ready.items()}
        )
        for name, one in ready.items():
            pretrain.describe(one, begin[name])
        if _step(begin) < ready[first].total:
            _train(ready, paths, checkpoints, begin, position, goodput)
    for name, one in ready.items():
        build.refresh(one.config.log.report, str(paths[name]))
    return {"step": ready[first].total, "seconds": time.monotonic() - started}


def _prepared(configs: Mapping[str, ConfigDict], source: Source | None) -> dict[str, Prepared]:
    """All runs, checked; they share the images and the teacher's weights."""
    source = source or pipeline.open_source(next(iter(configs.values())).data)
    ready: dict[str, Prepared] = {}
    loaded = None
    for name, config in configs.items():
        ready[name] = prepare(config, source, loaded)
        loaded = loaded or ready[name].teacher
    check(ready)
    return ready


def check(ready: Mapping[str, Prepared]) -> None:
    """Refuses runs that cannot train together.

    Raises:
      UserError: with the settings in which they differ.
    """
    (first, expected), *rest = ((name, _shared(one.config)) for name, one in ready.items())
    for name, fields in rest:
        differing = sorted(k for k in expected if fields.get(k) != expected[k])
        if differing:
            raise errors.UserError(
                f"{first} and {name} cannot train together: they differ in config."
                + ", config.".join(differing)
                + ". What may differ: "
                + ", ".join(f"config.{own}" for own in OWN)
                + "."
            )
    if len({key(one.config, one.method) for one in ready.values()}) > 1:
        raise errors.UserError(
            f"{', '.join(ready)} cannot train together: their objectives want other views or "
            "outputs of the teacher, or none."
        )


def _train(
    ready: Mapping[str, Prepared],
    paths: Mapping[str, epath.Path],
    checkpoints: joint.JointCheckpoints,
    begin: Mapping[str, state.TrainState],
    position: Any,
    goodput: Goodput,
) -> None:
    """The loop, from `begin` to the last step."""
    first = next(iter(ready.values()))
    start = _step(begin)
    learners = {name: one.built.learner for name, one in ready.items()}
    made = step.make_joint_step(learners, first.recipe, first.config.seed, first.period)
    loggers = {
        name: Logger(
            str(paths[name]), tensorboard=pretrain.tensorboard(one.config, paths[name]), step=start
        )
        for name, one in ready.items()
    }
    with (
        contextlib.closing(joint.JointLogger(loggers)) as logger,
        pretrain.batches_of(first, position) as batches,
    ):
        for name, one in ready.items():
            pretrain.show_views(one.config, one.source, paths[name], loggers[name], start)
        loop.run(
            step.parallel(made),
            state.everywhere(dict(begin)),
            state.everywhere(first.frozen),
            batches,
            pretrain.schedule(first, start, paths[next(iter(ready))]),
            logger,
            checkpoints,
            joint.watching({name: _watch(one) for name, one in ready.items()}),
            goodput,
            _evaluation(ready),
            joint.summarise,
            joint.check_states,
        )


def _watch(ready: Prepared) -> health.Watch:
    spec = ready.config.health
    return health.Watch(spec.min_std, spec.patience, spec.stop)


def _checkpoints(
    ready: Mapping[str, Prepared], paths: Mapping[str, epath.Path]
) -> dict[str, checkpoint.Checkpoints]:
    return {
        name: checkpoint.Checkpoints(
            str(paths[name]), one.config.checkpoint.keep, one.config.checkpoint.best_metric
        )
        for name, one in ready.items()
    }


def _evaluation(ready: Mapping[str, Prepared]) -> Callable[[int, Any], dict[str, float]]:
    """What the loop calls now and then: kNN of every student."""
    first = next(iter(ready.values()))
    drawn = functools.cache(lambda: monitor.sample(first.config, first.source))
    looks = {
        name: monitor.knn_of(one.config, one.method.networks["student"].encoder, one.source, drawn)
        for name, one in ready.items()
    }

    def eval_fn(step: int, states: Mapping[str, state.TrainState]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, one in looks.items():
            found |= joint.named(name, one(step, states[name]))
        return found

    return eval_fn


def _step(states: Mapping[str, state.TrainState]) -> int:
    return int(next(iter(states.values())).step)
