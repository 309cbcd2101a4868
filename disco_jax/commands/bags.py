"""Find similar images in a teacher's feature space: nearest neighbours or clusters."""

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, typed
from disco_jax.data import pipeline
from disco_jax.data.bags import Bags
from disco_jax.data.contract import Source
from disco_jax.data.data_settings import DataSettings, build_views
from disco_jax.evaluate import features, kmeans, knn
from disco_jax.evaluate.open_model import open_model
from disco_jax.files import whole
from disco_jax.methods.base import OUTPUTS

KINDS = ("knn", "kmeans")
FILE, ABOUT = "bags.npz", "bags.json"


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Encodes the training split without augmentation and writes `workdir`/bags.npz.

    Args:
      config: see `configs/bags.py`.
      workdir: output directory, created if missing.
      source: images; None opens `config.data`.

    Returns:
      {"file", "images", "kind", ...}, as written to `workdir`/bags.json.

    Raises:
      UserError: a setting, the data or the teacher is invalid.
    """
    if config.kind not in KINDS:
        raise errors.unknown("config.kind", config.kind, KINDS)
    if config.output not in OUTPUTS:
        raise errors.unknown("config.output", config.output, OUTPUTS)
    if not config.teacher:
        raise errors.UserError(
            "config.teacher is empty: give the directory of a run or an import, or a checkpoint."
        )
    data = typed.parse(DataSettings, config.data, "config.data", defaults=True)
    source = source or pipeline.open_source(data, shared=False)
    source.take(config.data.train_split, ())  # raises if a run could not read images by number
    rows = _encode(config, source)
    if config.kind == "knn":
        bags, about = _neighbour_bags(rows, config.neighbours)
    else:
        centroids, clusters = kmeans.kmeans(
            rows, config.clusters, iterations=config.iterations, seed=config.seed
        )
        bags = Bags(clusters=clusters)
        about = {"clusters": len(centroids), "empty": int((np.bincount(
            clusters, minlength=len(centroids)) == 0).sum())}  # fmt: skip
    path = epath.Path(workdir) / FILE
    result = {
        "file": str(path),
        "images": len(bags),
        "data": source.name,
        "split": config.data.train_split,
        "teacher": config.teacher,
        "kind": config.kind,
        **about,
    }
    if jax.process_index() == 0:
        _write(path, bags, result)
    return result


def _encode(config: ConfigDict, source: Source) -> np.ndarray:
    """Returns the teacher's output f32[N, F] for all training images, in stored order."""
    opened = open_model(config.teacher)
    augment = opened.settings.augment
    size, devices = config.size or augment.size, jax.local_device_count()
    batches = source.evaluate(
        config.data.train_split,
        size,
        config.data.eval_resize,
        features.eval_interpolation(opened.settings),
        -(-config.batch_size // devices) * devices,
    )
    recipe = build_views(augment, opened.settings.views, opened.settings.local)
    compute = opened.encoder.compute.for_inference(opened.settings.fast)
    encoder = opened.encoder.with_compute(compute)
    extracted = features.extract(encoder, opened.variables, batches, recipe)
    rows = getattr(extracted, config.output)
    if len(rows) != source.count(config.data.train_split):
        raise errors.UserError(
            f"Only {len(rows)} of {source.count(config.data.train_split)} images could be read. "
            f"Bags refer to images by position: remove the others from {source.name}."
        )
    return rows


def _neighbour_bags(rows: np.ndarray, count: int) -> tuple[Bags, dict[str, Any]]:
    """Returns the `count` nearest neighbours of each row, without the row itself."""
    if not 1 <= count < len(rows):
        raise errors.UserError(f"config.neighbours={count} must lie between 1 and {len(rows) - 1}.")
    similarities, indices = knn.neighbours(rows, rows, count + 1)
    is_self = indices == np.arange(len(rows))[:, None]
    # A row can miss itself among exact duplicates; the last neighbour is dropped instead.
    is_self[~is_self.any(axis=1), -1] = True
    neighbours = indices[~is_self].reshape(len(rows), count).astype(np.int32)
    closest = similarities[~is_self].reshape(len(rows), count)[:, 0]
    return Bags(neighbours=neighbours), {"neighbours": count, "mean_cosine": float(closest.mean())}


def _write(path: epath.Path, bags: Bags, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(str(path)) as target, open(target, "wb") as file:
        bags.save(file)
    (path.parent / ABOUT).write_text(json.dumps(result, indent=2) + "\n")
    print(f"{path}: bags of {result['images']} images ({result['kind']})")
