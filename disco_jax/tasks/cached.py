"""Which outputs of a teacher a run can take from a cache, and whether a cache is of them."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data import targets
from disco_jax.data.base import Source
from disco_jax.methods.base import Method, Record
from disco_jax.nested import flatten
from disco_jax.train.teacher import Teacher

# Settings that say what the teacher is and what it is shown, and those of them that do not: where
# the data lie and how they are read, and what the checksum of the weights stands for.
_TOLD = (
    "seed", "batch_size", "dtype", "views", "augment.", "local.", "group_views", "data.", "bags.",
    "teacher.",
)  # fmt: skip
_IMAGES = "fingerprint of the images"
_NOT_TOLD = (
    "data.dir", "data.cache", "data.max_unreadable", "data.max_unreadable_percent",
    "data.eval_split", "data.eval_resize", "data.labels",
    "teacher.weights", "teacher.cache", "teacher.network",
)  # fmt: skip
# Settings that older caches do not have, with the value that says what was done then.
_LATER = {"data.splits": "", "data.range": "full", "data.max_pixels": 178_956_970}


def wanted(method: Method, record: Record) -> dict[int, dict[str, int]]:
    """view -> output -> width: what the objectives read of the teacher.

    Raises:
      UserError: they read nothing of it, or its feature maps.
    """
    if "teacher" not in method.plan:
        raise errors.UserError("No objective reads a teacher, so there is nothing to keep of one.")
    if method.reads_maps("teacher"):
        raise errors.UserError(
            "config.teacher.cache keeps embeddings and features, not the feature maps that "
            "config.objectives.attention reads: set its weight to 0, or do without the cache."
        )
    return method.teacher_outputs(record)


def made_of(
    config: ConfigDict, method: Method, record: Record, source: Source, loaded: Teacher
) -> dict[str, Any]:
    """All that the outputs depend on, as it stands in targets.json.

    Args:
      config: resolved.
      method: what `methods.build` made of it.
      record: of shapes, see `state.shapes`.
      source: the images.
      loaded: the teacher.
    """
    fields = flatten(json.loads(config.to_json_best_effort()))
    told = {
        f"config.{name}": value
        for name, value in fields.items()
        if name.startswith(_TOLD) and name not in _NOT_TOLD and _LATER.get(name) != value
    }
    network = method.networks["teacher"]
    if network.norm == "local" and not config.teacher.norm_group:
        told["devices"] = jax.device_count()  # that share a batch and its statistics
    return told | {
        "hosts": jax.process_count(),
        "images": source.count(config.data.train_split),
        _IMAGES: source.fingerprint(config.data.train_split),
        "weights of the teacher (CRC-32)": checksum(loaded),
        "views mixed by": [repr(o) for o in method.objectives.values() if o.makes],
        "outputs": {str(v): named for v, named in wanted(method, record).items()},
    }


def checksum(loaded: Teacher) -> int:
    """CRC-32 of the weights and statistics."""
    value = 0
    for leaf in jax.tree.leaves(loaded.variables):
        value = zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).data, value)
    return value


def opened(folder: str, told: Mapping[str, Any]) -> targets.Targets:
    """The outputs in a folder, of this host.

    Args:
      folder: `config.teacher.cache`.
      told: see `made_of`.

    Raises:
      UserError: they are of another teacher, recipe, seed or data set, with what differs.
    """
    compare(f"config.teacher.cache={folder!r}", targets.read_meta(folder), told)
    return targets.Targets(folder, jax.process_index(), jax.process_count())


def compare(what: str, meta: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Refuses outputs that were made of something else; more of them than needed do no harm.

    Args:
      what: the folder, for the message.
      meta: of targets.json.
      told: see `made_of`.
    """
    kept, told = dict(meta["made_of"]), dict(json.loads(json.dumps(told)))
    if _IMAGES not in kept:  # of an earlier version
        told.pop(_IMAGES, None)
    if all(
        named.items() <= kept["outputs"].get(v, {}).items() for v, named in told["outputs"].items()
    ):
        kept["outputs"] = told["outputs"]
    differing = [
        f"{name}: {kept.get(name, '(absent)')!r} -> {told.get(name, '(absent)')!r}"
        for name in sorted(kept.keys() | told.keys())
        if kept.get(name) != told.get(name)
    ]
    if differing:
        raise errors.UserError(
            f"{what} was made of something else:\n  "
            + "\n  ".join(differing)
            + "\nMake another with `disco-jax cache`, or give the old values."
        )
