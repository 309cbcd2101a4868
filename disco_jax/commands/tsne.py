"""Plot ten classes in the feature spaces of one or several runs with t-SNE (DisCo, figure 8)."""

from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data.contract import Source
from disco_jax.evaluate import features, plots, saved, target
from disco_jax.evaluate.probe_settings import eval_data
from disco_jax.report import build


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Reduces the features of the same images to two dimensions, separately for each run.

    Writes NAME.png, NAME.npz (places, labels) and NAME.json to `workdir`. NAME is `config.name`.

    Args:
      config: see `configs/tsne.py`.
      workdir: a run's directory; all runs are evaluated on its data.
      source: images; None opens the data of the run, changed by `config.data`.

    Returns:
      {"classes", "images", "metric", "neighbours_top1": run -> percentage of images whose nearest
      point in the plot has the same class}.

    Raises:
      UserError: a setting, a run or the data is invalid, or scikit-learn is missing.
    """
    reduce = _tsne(config)
    runs = [workdir, *config.beside]
    titles = _titles(config, runs)
    networks = [
        target.with_eval_data(features.load(run, config.network), eval_data(config.data))
        for run in runs
    ]
    for trained in networks:
        features.check_outputs(trained, (config.output,), config.blocks)
    first, source = target.opened(networks[0], source)
    split = config.split or first.settings.data.eval_split
    extracted = [_extract(config, trained, source, split) for trained in networks]
    classes, rows = _select(config, extracted[0].labels)
    labels = np.searchsorted(classes, extracted[0].labels[rows])
    places = {
        title: reduce(getattr(run_features, config.output)[rows])
        for title, run_features in zip(titles, extracted, strict=True)
    }
    top1 = {title: _neighbour_top1(points, labels) for title, points in places.items()}
    result = {"classes": classes.tolist(), "images": len(rows), "metric": config.metric}
    result["neighbours_top1"] = top1
    arrays = {f"places_{i}": points for i, points in enumerate(places.values())}
    saved.write(workdir, config.name, result, labels=extracted[0].labels[rows], **arrays)
    if jax.process_index() == 0:
        file = epath.Path(workdir) / f"{config.name}.png"
        names = config.names or [f"class {label}" for label in classes]
        plots.embeddings(places, labels, [str(name) for name in names], file)
        print(f"{len(rows)} images of {len(classes)} classes: {file}")
    build.refresh(config.report, workdir)
    return result


def _extract(
    config: ConfigDict, trained: features.TrainedModel, source: Source, split: str
) -> features.Features:
    return features.of_split(
        trained, source, split, config.batch_size, (config.output,), config.blocks
    )


def _select(config: ConfigDict, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the plotted classes, sorted, and the rows of the first images of each."""
    available = np.unique(labels)
    classes = np.array(sorted(config.classes) or available[: config.num_classes])
    missing = sorted(set(classes.tolist()) - set(available.tolist()))
    if missing:
        raise errors.UserError(
            f"config.classes={tuple(config.classes)}: the split has no image of class "
            f"{missing[0]}; it has {len(available)} classes, {available[0]} to {available[-1]}."
        )
    rows = [np.flatnonzero(labels == label)[: config.images_per_class] for label in classes]
    return classes, np.concatenate(rows)


def _titles(config: ConfigDict, runs: list[str]) -> list[str]:
    """Returns a unique title for each run: config.titles, the directory names, or the paths."""
    count = len(config.classes) or config.num_classes
    if config.names and len(config.names) != count:
        raise errors.UserError(
            f"config.names has {len(config.names)} names for {count} classes; give one per class, "
            "in the order of the class numbers."
        )
    titles = list(config.titles) or [epath.Path(run).name for run in runs]
    if len(titles) != len(runs):
        raise errors.UserError(
            f"config.titles has {len(titles)} titles for {len(runs)} runs: give the title of "
            "--workdir first, then those of config.beside."
        )
    return titles if len(set(titles)) == len(titles) else runs


def _neighbour_top1(points: np.ndarray, labels: np.ndarray) -> float:
    """Returns the percentage of points whose nearest other point has the same class."""
    points = np.asarray(points, np.float64)
    squared_distance = ((points[:, None] - points[None]) ** 2).sum(-1)
    np.fill_diagonal(squared_distance, np.inf)
    return round(100 * float(np.mean(labels[squared_distance.argmin(1)] == labels)), 2)


def _tsne(config: ConfigDict):
    """Returns a function that maps f32[N, F] to f32[N, 2] by t-SNE."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise errors.UserError('t-SNE needs scikit-learn: pip install "disco-jax[tsne]".') from None

    most = config.images_per_class * (len(config.classes) or config.num_classes)
    if not 0 < config.perplexity < most:
        raise errors.UserError(
            f"config.perplexity={config.perplexity} must be above 0 and below the {most} plotted "
            "images."
        )

    def reduce(rows: np.ndarray) -> np.ndarray:
        points = TSNE(
            metric=config.metric,
            init="pca",
            perplexity=min(config.perplexity, (len(rows) - 1) / 3),
            random_state=config.seed,
        ).fit_transform(rows)
        return points.astype(np.float32)

    return reduce
