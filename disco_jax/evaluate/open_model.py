"""Loading of a trained network for deployment, from a run, an import or a PyTorch file."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from disco_jax import convert, errors, files, models
from disco_jax.convert import manifest as manifests
from disco_jax.evaluate import features
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.run.workdir import ENVIRONMENT
from disco_jax.train import teacher
from disco_jax.train.experiment import parse
from disco_jax.train.run_settings import RunSettings


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A float32 network with the config and provenance needed to use it.

    Attributes:
      backbone: name in `models.BACKBONES`.
      encoder: the network, computing in float32.
      variables: {"params", "batch_stats"}.
      settings: settings of the pretraining run.
      provenance: name -> value, for the model card.
    """

    backbone: str
    encoder: Encoder
    variables: Variables
    settings: RunSettings
    provenance: dict[str, Any]

    def __call__(self, images: np.ndarray | jax.Array, output: str = "features") -> jax.Array:
        """Maps normalised images f32[B, H, W, 3] to an output f32[B, D], at full precision."""
        with jax.default_matmul_precision("highest"):
            return getattr(self.encoder.apply(self.variables, images, norm="running"), output)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Resize, crop and normalisation of evaluations, for the model card."""
        data, augment = self.settings.data, self.settings.augment
        return {
            "resize": data.eval_resize or augment.size,
            "crop": augment.size,
            "interpolation": features.eval_interpolation(self.settings),
            "mean": list(augment.mean),
            "std": list(augment.std),
        }


def open_model(path: str, network: str = "student") -> OpenedModel:
    """Loads the newest good checkpoint of a run or an import, or a PyTorch file.

    Args:
      path: the directory or file.
      network: network of a run: "student", or "momentum" for its EMA copy.

    Raises:
      UserError: the path does not exist, or its format is unknown.
    """
    if not epath.Path(path).exists():
        raise errors.UserError(f"{path} does not exist. Give a run's directory or a checkpoint.")
    place = teacher.place(path)
    if not place.is_dir():
        imported = convert.read_network(path)
        settings = parse(manifests.config_of(imported))
        encoder, variables = imported.encoder, imported.variables
        provenance = _file_provenance(manifests.describe(imported, path))
    else:
        trained = features.load(path, network)
        settings, variables = trained.settings, trained.variables
        encoder = models.build_encoder(settings.student)
        provenance = _run_provenance(place, network, trained)
    return OpenedModel(settings.student.backbone, encoder, variables, settings, provenance)


def _file_provenance(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: manifest[name] for name in ("file", "sha256", "family", "layout")}


def _run_provenance(
    path: epath.Path, network: str, trained: features.TrainedModel
) -> dict[str, Any]:
    manifest = path / manifests.MANIFEST
    if manifest.exists():
        return _file_provenance(files.read_json(manifest))
    settings = trained.settings
    facts = {"run": str(path), "network": network, "step": trained.step, "recipe": settings.name}
    if settings.teacher.weights:
        facts["teacher"] = settings.teacher.weights
    if weights := settings.student.weights:
        facts["student started from"] = weights
    environment = path / ENVIRONMENT
    if environment.exists():
        facts["code"] = files.read_json(environment, list)[-1]["git"]
    return facts
