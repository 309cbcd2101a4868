"""Description of an imported network: its manifest, and the config of a run that contains it."""

import datetime
from typing import Any

from ml_collections import ConfigDict

from disco_jax import models
from disco_jax.configs import common
from disco_jax.convert.load import Imported, size_and_digest
from disco_jax.version import __version__

MANIFEST = "manifest.json"


def config_of(imported: Imported) -> ConfigDict:
    """Returns a pretraining config whose student is the imported network."""
    config = common.pretrain()
    config.name = imported.family
    config.student.update(imported.spec)
    config.teacher.head = "mlp"
    config.augment.mean, config.augment.std = imported.normalisation
    if imported.queue is not None:
        config.objectives.contrast.update(
            weight=1.0, queue_size=len(imported.queue.vectors), queue_init="random"
        )
        config.batch_size = 1  # divides every queue length
    return config


def describe(imported: Imported, file: str) -> dict[str, Any]:
    """Returns the manifest of an imported network."""
    mean, std = imported.normalisation
    encoder = imported.encoder
    size, digest = size_and_digest(file)
    return {
        "file": str(file),
        "bytes": size,
        "sha256": digest,
        "imported": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "disco_jax": __version__,
        "container": imported.container,
        "family": imported.family,
        "layout": imported.layout,
        "network": {k: list(v) if isinstance(v, tuple) else v for k, v in imported.spec.items()},
        "parameters": {
            part: models.parameters(encoder, (part,)) for part in ("backbone", "head", "prototypes")
        },
        "preprocessing": {"range": [0, 1], "mean": list(mean), "std": list(std)},
        "queue": None if imported.queue is None else list(imported.queue.vectors.shape),
        "keys": imported.keys,
        "not_taken": sorted(imported.unused_keys),
    }
