"""Train several students in one step: they share the images and the teacher's forward passes."""

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
from disco_jax.data.contract import Source
from disco_jax.evaluate import monitor
from disco_jax.nested import flatten
from disco_jax.report import build, sheet
from disco_jax.run import checkpoint, unreadable
from disco_jax.run.goodput import Goodput
from disco_jax.run.metrics import Logger
from disco_jax.run.workdir import claim
from disco_jax.train import health, joint, loop, session, state, step
from disco_jax.train.experiment import Experiment, parse
from disco_jax.train.prepare import Prepared, prepare, starting

# Config fields that may differ between students of one joint training.
OWN = (
    "name",
    "student.",
    "momentum.",
    "objectives.",
    "optimizer.",
    "learning_rate.",
    "health.",
)


def key(experiment: Experiment) -> str:
    """Returns a key that is equal for runs that can train together."""
    method = experiment.method
    parts: dict[str, Any] = {"config": _shared(experiment.config)}
    network, views = method.networks.get("teacher"), method.plan.get("teacher", ())
    if network is not None:
        parts["teacher"] = repr(network)
        # The teacher's output for a view depends on the views that share its batch statistics, and
        # on how the view was mixed.
        if network.grouped and network.norm != "running":
            parts["views"] = views
        if any(view in o.synthetic_views for o in method.objectives.values() for view in views):
            parts["mixed"] = [repr(o) for o in method.objectives.values() if o.synthetic_views]
    return json.dumps(parts, sort_keys=True, default=str)


def groups(keys: Mapping[str, str], most: int) -> list[list[str]]:
    """Groups runs with equal keys, in their order.

    Args:
      keys: name -> `key` of a run.
      most: largest number of runs in a group, 1 or more.
    """
    by_key: dict[str, list[str]] = {}
    for name, run_key in keys.items():
        by_key.setdefault(run_key, []).append(name)
    return [names[i : i + most] for names in by_key.values() for i in range(0, len(names), most)]


def _shared(config: ConfigDict) -> dict[str, Any]:
    fields = flatten(json.loads(config.to_json_best_effort()))
    return {name: value for name, value in fields.items() if not name.startswith(OWN)}


def run(
    configs: Mapping[str, ConfigDict],
    workdirs: Mapping[str, str],
    source: Source | None = None,
) -> dict[str, Any]:
    """Trains several configs to their last step; the directories are as if each run was alone.

    Args:
      configs: name -> config of a pretraining run; they may differ only in the fields of `OWN`.
      workdirs: name -> the run's directory; all have checkpoints of the same steps, or none.
      source: images; None opens `config.data`.

    Returns:
      {"step", "seconds"}.

    Raises:
      UserError: a setting is invalid, or the runs cannot share images and teacher.
      joint.Diverged: some runs have non-finite losses; the others can continue without them.
      NumericError, Preempted: see `loop.run`.
    """
    started = time.monotonic()
    prepared = _prepare_all(configs, source)
    ready = {name: starting(run, workdirs[name]) for name, run in prepared.items()}
    paths = {name: epath.Path(workdirs[name]) for name in ready}
    first = next(iter(ready))
    session.warn_if_dark(ready[first])
    with contextlib.ExitStack() as stack:
        for name, run in ready.items():
            stack.enter_context(
                claim(str(paths[name]), run.experiment.config, (), session.images_of(run))
            )
        others = [str(path) for name, path in paths.items() if name != first]
        goodput = stack.enter_context(
            contextlib.closing(Goodput(str(paths[first]), started, also=others))
        )
        unreadable.keep(ready[first].source, paths[first])
        checkpoints = stack.enter_context(
            contextlib.closing(joint.JointCheckpoints(_checkpoints(ready, paths)))
        )
        start, position = session.resume(
            checkpoints, {name: session.fresh(run) for name, run in ready.items()}
        )
        for name, run in ready.items():
            session.describe(run, start[name])
        if _step(start) < ready[first].experiment.total_steps:
            _train(ready, paths, checkpoints, start, position, goodput)
    for name, run in ready.items():
        build.refresh(run.settings.log.report, str(paths[name]))
    return {"step": ready[first].experiment.total_steps, "seconds": time.monotonic() - started}


def _prepare_all(configs: Mapping[str, ConfigDict], source: Source | None) -> dict[str, Prepared]:
    """Prepares and checks all runs; they share the images and the teacher's weights."""
    source = source or pipeline.open_source(parse(next(iter(configs.values()))).data)
    ready: dict[str, Prepared] = {}
    loaded = None
    for name, config in configs.items():
        ready[name] = prepare(config, source, loaded)
        loaded = loaded or ready[name].teacher
    check(ready)
    return ready


def check(ready: Mapping[str, Prepared]) -> None:
    """Checks that runs can train together.

    Raises:
      UserError: with the settings that differ.
    """
    (first, expected), *rest = (
        (name, _shared(run.experiment.config)) for name, run in ready.items()
    )
    for name, fields in rest:
        differing = sorted(k for k in expected if fields.get(k) != expected[k])
        if differing:
            raise errors.UserError(
                f"{first} and {name} cannot train together: they differ in config."
                + ", config.".join(differing)
                + ". Only these may differ: "
                + ", ".join(f"config.{field}" for field in OWN)
                + "."
            )
    if len({key(run.experiment) for run in ready.values()}) > 1:
        raise errors.UserError(
            f"{', '.join(ready)} cannot train together: their objectives read different views or "
            "outputs of the teacher."
        )


def _train(
    ready: Mapping[str, Prepared],
    paths: Mapping[str, epath.Path],
    checkpoints: joint.JointCheckpoints,
    begin: Mapping[str, state.TrainState],
    position: Any,
    goodput: Goodput,
) -> None:
    """Runs the training loop from `begin` to the last step."""
    first = next(iter(ready.values()))
    start = _step(begin)
    learners = {name: run.built.learner for name, run in ready.items()}
    joint_step = step.make_joint_step(
        learners, first.experiment.views, first.settings.seed, first.period
    )
    loggers = {
        name: Logger(
            str(paths[name]), tensorboard=session.tensorboard(run.settings, paths[name]), step=start
        )
        for name, run in ready.items()
    }
    with (
        contextlib.closing(joint.JointLogger(loggers)) as logger,
        session.batches_of(first, position) as batches,
    ):
        for name, run in ready.items():
            sheet.show(run.settings, run.source, paths[name], loggers[name], start)
        loop.run(
            step.parallel(joint_step),
            state.replicate(dict(begin)),
            state.replicate(first.frozen),
            batches,
            session.schedule(first, start, paths[next(iter(ready))]),
            logger,
            checkpoints,
            joint.watching({name: _watch(run) for name, run in ready.items()}),
            goodput,
            _evaluation(ready),
            joint.summarise,
            joint.check_states,
        )


def _watch(ready: Prepared) -> health.Watch:
    return health.Watch(ready.settings.health)


def _checkpoints(
    ready: Mapping[str, Prepared], paths: Mapping[str, epath.Path]
) -> dict[str, checkpoint.Checkpoints]:
    return {
        name: checkpoint.Checkpoints(
            str(paths[name]), run.settings.checkpoint.keep, run.settings.checkpoint.best_metric
        )
        for name, run in ready.items()
    }


def _evaluation(ready: Mapping[str, Prepared]) -> Callable[[int, Any], dict[str, float]]:
    """Returns the loop's evaluation function: kNN accuracy of every student."""
    first = next(iter(ready.values()))
    sample = functools.cache(lambda: monitor.sample(first.settings, first.source))
    eval_fns = {
        name: monitor.knn_of(
            run.settings, run.method.networks["student"].encoder, run.source, sample
        )
        for name, run in ready.items()
    }

    def evaluate(step: int, states: Mapping[str, state.TrainState]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, eval_fn in eval_fns.items():
            metrics |= joint.named(name, eval_fn(step, states[name]))
        return metrics

    return evaluate


def _step(states: Mapping[str, state.TrainState]) -> int:
    return int(next(iter(states.values())).step)
