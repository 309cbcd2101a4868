"""A trained network to deploy: from a run, from an import, or straight from a PyTorch file."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import convert, errors, files, models
from disco_jax.evaluate import features
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.tasks import importing
from disco_jax.train import teacher
from disco_jax.train.workdir import ENVIRONMENT


@dataclasses.dataclass(frozen=True)
class Opened:
    """A network in float32 and what has to be known to use it.

    Attributes:
      backbone: its name in `models.BACKBONES`.
      encoder: computes in float32.
      variables: {"params", "batch_stats"}.
      config: of the run; a pretraining config.
      provenance: name -> value, for the model card.
    """

    backbone: str
    encoder: Encoder
    variables: Variables
    config: ConfigDict
    provenance: dict[str, Any]

    def __call__(self, images: np.ndarray | jax.Array, output: str = "features") -> jax.Array:
        """f32[B, H, W, 3] normalised images -> f32[B, D], at full precision."""
        with jax.default_matmul_precision("highest"):
            return getattr(self.encoder.apply(self.variables, images, norm="running"), output)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes the network's input, as evaluations do it."""
        config = self.config
        return {
            "resize": config.data.eval_resize or config.augment.size,
            "crop": config.augment.size,
            "interpolation": config.augment.interpolation,
            "mean": list(config.augment.mean),
            "std": list(config.augment.std),
        }


def open_network(path: str, network: str = "student") -> Opened:
    """The newest good checkpoint of a run or an import, or the network of a PyTorch file.

    Args:
      path: of the directory or file.
      network: of a run: "student", or "momentum" for its EMA copy.

    Raises:
      UserError: nothing there, or nothing that is understood.
    """
    if not epath.Path(path).exists():
        raise errors.UserError(f"{path} does not exist. Give a run's directory or a checkpoint.")
    place = teacher.place(path)
    if not place.is_dir():
        imported = convert.read_network(path)
        config = importing.config_of(imported)
        encoder, variables = imported.encoder, imported.variables
        provenance = _of_file(importing.describe(imported, path))
    else:
        trained = features.load(path, network)
        config, variables = trained.config, trained.variables
        encoder = models.build_encoder(config.student)
        provenance = _of_run(place, network, trained)
    return Opened(config.student.backbone, encoder, variables, config, provenance)


def _of_file(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: manifest[name] for name in ("file", "sha256", "family", "layout")}


def _of_run(path: epath.Path, network: str, trained: features.TrainedModel) -> dict[str, Any]:
    manifest = path / importing.MANIFEST
    if manifest.exists():
        return _of_file(files.read_json(manifest))
    config = trained.config
    found = {"run": str(path), "network": network, "step": trained.step, "recipe": config.name}
    if config.teacher.weights:
        found["teacher"] = config.teacher.weights
    if started := config.student.get("weights", ""):
        found["student started from"] = started
    environment = path / ENVIRONMENT
    if environment.exists():
        found["code"] = files.read_json(environment, list)[-1]["git"]
    return found
