"""Compatibility of cached teacher outputs with a run."""

import json
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from disco_jax import errors
from disco_jax.data import targets
from disco_jax.data.contract import Source
from disco_jax.nested import flatten

if TYPE_CHECKING:
    from disco_jax.train.experiment import Experiment
    from disco_jax.train.teacher import Teacher

# Config fields that define the teacher and its inputs. Excluded are fields about where and how the
# data are read, and fields that the checksum of the weights covers.
_ORIGIN_FIELDS = (
    "seed", "batch_size", "dtype", "views", "augment.", "local.", "group_views", "data.", "bags.",
    "teacher.",
)  # fmt: skip
_IMAGES = "fingerprint of the images"
_EXCLUDED_FIELDS = (
    "data.dir", "data.cache", "data.max_unreadable", "data.max_unreadable_percent",
    "data.eval_split", "data.eval_resize", "data.eval_interpolation", "data.labels",
    "teacher.weights", "teacher.cache", "teacher.network",
)  # fmt: skip
# Fields that older caches lack, with the value that describes those caches.
_ADDED_FIELDS = {"data.splits": "", "data.range": "full", "data.max_pixels": 178_956_970}


def required_outputs(experiment: "Experiment") -> dict[int, dict[str, int]]:
    """Returns the teacher outputs that the objectives read: view -> output name -> width.

    Raises:
      UserError: they read no teacher output, or its feature maps.
    """
    if "teacher" not in experiment.needs:
        raise errors.UserError("No objective reads a teacher: there are no outputs to cache.")
    if experiment.method.reads_maps("teacher"):
        raise errors.UserError(
            "config.teacher.cache contains embeddings and features, but not the feature maps that "
            "config.objectives.attention reads: set its weight to 0, or leave the cache empty."
        )
    return experiment.method.teacher_outputs(experiment.record)


def origin(experiment: "Experiment", source: Source, loaded: "Teacher") -> dict[str, Any]:
    """Returns everything that determines the outputs, as saved in targets.json.

    Args:
      experiment: the run.
      source: the images.
      loaded: the teacher.
    """
    settings, method = experiment.settings, experiment.method
    fields = flatten(json.loads(experiment.config.to_json_best_effort()))
    origin_fields = {
        f"config.{name}": value
        for name, value in fields.items()
        if name.startswith(_ORIGIN_FIELDS)
        and name not in _EXCLUDED_FIELDS
        and _ADDED_FIELDS.get(name) != value
    }
    network = method.networks["teacher"]
    if network.norm == "local" and not settings.teacher.norm_group:
        origin_fields["devices"] = (
            jax.device_count()
        )  # batch statistics depend on the batch per device
    return origin_fields | {
        "hosts": jax.process_count(),
        "images": source.count(settings.data.train_split),
        _IMAGES: source.fingerprint(settings.data.train_split),
        "weights of the teacher (CRC-32)": checksum(loaded),
        "views mixed by": [repr(o) for o in method.objectives.values() if o.synthetic_views],
        "outputs": {str(v): named for v, named in required_outputs(experiment).items()},
    }


def checksum(loaded: "Teacher") -> int:
    """Returns the CRC-32 of the teacher's parameters and batch statistics."""
    value = 0
    for leaf in jax.tree.leaves(loaded.variables):
        value = zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).data, value)
    return value


def open_targets(folder: str, expected: Mapping[str, Any]) -> targets.Targets:
    """Opens this host's part of the cached outputs in a folder.

    Args:
      folder: `config.teacher.cache`.
      expected: origin of the run's teacher outputs, see `origin`.

    Raises:
      UserError: the outputs belong to another teacher, recipe, seed or data set; the message lists
        the differences.
    """
    compare(f"config.teacher.cache={folder!r}", targets.read_meta(folder), expected)
    return targets.Targets(folder, jax.process_index(), jax.process_count())


def compare(folder: str, meta: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Checks that cached outputs have the expected origin.

    The cache may contain more outputs than the run reads.

    Args:
      folder: the setting and its folder, for the message.
      meta: content of targets.json.
      expected: see `origin`.

    Raises:
      UserError: with the differences.
    """
    saved, expected = dict(meta["made_of"]), dict(json.loads(json.dumps(expected)))
    if _IMAGES not in saved:  # written by an earlier version
        expected.pop(_IMAGES, None)
    if all(
        widths.items() <= saved["outputs"].get(view, {}).items()
        for view, widths in expected["outputs"].items()
    ):
        saved["outputs"] = expected["outputs"]
    differing = [
        f"{name}: {saved.get(name, '(absent)')!r} -> {expected.get(name, '(absent)')!r}"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if differing:
        raise errors.UserError(
            f"{folder} was created with other settings:\n  "
            + "\n  ".join(differing)
            + "\nCreate another cache with `disco-jax cache`, or restore the old values."
        )
