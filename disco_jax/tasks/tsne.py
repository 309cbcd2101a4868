"""Draw ten classes as the features of one or several runs arrange them (DisCo, figure 8)."""

from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data.base import Source
from disco_jax.evaluate import features, plots, saved, target
from disco_jax.report import build


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Reduces the features of the same images to two dimensions, for every run apart.

    Writes NAME.png, NAME.npz (places, labels) and NAME.json to `workdir`, NAME being `config.name`.

    Args:
      config: see `configs/tsne.py`.
      workdir: a run's directory; its data are taken for all runs.
      source: images; None opens the run's own data, or what `config.data` names.

    Returns:
      {"classes", "images", "neighbours_top1": run -> percent of the images whose nearest point in
      the picture is of their class}.

    Raises:
      UserError: a setting, a run or the data will not do, or scikit-learn is missing.
    """
    reduce = _tsne(config)
    runs = [workdir, *config.beside]
    titles = _titles(config, runs)
    networks = [
        target.with_eval_data(features.load(run, config.network), config.data) for run in runs
    ]
    for trained in networks:
        features.check_outputs(trained, (config.output,), config.blocks)
    first, source = target.opened(networks[0], source)
    split = config.split or first.config.data.eval_split
    found = [_of(config, trained, source, split) for trained in networks]
    classes, rows = _chosen(config, found[0].labels)
    labels = np.searchsorted(classes, found[0].labels[rows])
    places = {
        title: reduce(getattr(one, config.output)[rows])
        for title, one in zip(titles, found, strict=True)
    }
    near = {title: _near(points, labels) for title, points in places.items()}
    result = {"classes": classes.tolist(), "images": len(rows), "neighbours_top1": near}
    kept = {f"places_{i}": points for i, points in enumerate(places.values())}
    saved.write(workdir, config.name, result, labels=found[0].labels[rows], **kept)
    if jax.process_index() == 0:
        file = epath.Path(workdir) / f"{config.name}.png"
        names = config.names or [f"class {label}" for label in classes]
        plots.embeddings(places, labels, [str(name) for name in names], file)
        print(f"{len(rows)} images of {len(classes)} classes: {file}")
    build.refresh(config.report, workdir)
    return result


def _of(
    config: ConfigDict, trained: features.TrainedModel, source: Source, split: str
) -> features.Features:
    return features.of_split(
        trained, source, split, config.batch_size, (config.output,), config.blocks
    )


def _chosen(config: ConfigDict, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes that are drawn, sorted, and the rows of the first images of each."""
    there = np.unique(labels)
    wanted = np.array(sorted(config.classes) or there[: config.num_classes])
    missing = sorted(set(wanted.tolist()) - set(there.tolist()))
    if missing:
        raise errors.UserError(
            f"config.classes={tuple(config.classes)}: the split has no image of class "
            f"{missing[0]}; it has {len(there)} classes, {there[0]} to {there[-1]}."
        )
    rows = [np.flatnonzero(labels == label)[: config.images_per_class] for label in wanted]
    return wanted, np.concatenate(rows)


def _titles(config: ConfigDict, runs: list[str]) -> list[str]:
    """Names above the pictures, each once."""
    wanted = len(config.classes) or config.num_classes
    if config.names and len(config.names) != wanted:
        raise errors.UserError(
            f"config.names has {len(config.names)} names for {wanted} classes; give one each, "
            "in the order of the classes' numbers."
        )
    given = list(config.titles) or [epath.Path(run).name for run in runs]
    if len(given) != len(runs):
        raise errors.UserError(
            f"config.titles has {len(given)} titles for {len(runs)} runs: --workdir comes first, "
            "then those of config.beside."
        )
    return given if len(set(given)) == len(given) else runs


def _near(points: np.ndarray, labels: np.ndarray) -> float:
    """Percent of points whose nearest other point is of their class."""
    shifted = np.asarray(points, np.float64)
    square = ((shifted[:, None] - shifted[None]) ** 2).sum(-1)
    np.fill_diagonal(square, np.inf)
    return round(100 * float(np.mean(labels[square.argmin(1)] == labels)), 2)


def _tsne(config: ConfigDict):
    """f32[N, F] -> f32[N, 2], cosine distances."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise errors.UserError('t-SNE needs scikit-learn: pip install "disco-jax[tsne]".') from None

    most = config.images_per_class * (len(config.classes) or config.num_classes)
    if not 0 < config.perplexity < most:
        raise errors.UserError(
            f"config.perplexity={config.perplexity} must lie above 0 and below the {most} images "
            "that are drawn."
        )

    def reduce(rows: np.ndarray) -> np.ndarray:
        made = TSNE(
            metric="cosine",
            init="pca",
            perplexity=min(config.perplexity, (len(rows) - 1) / 3),
            random_state=config.seed,
        ).fit_transform(rows)
        return made.astype(np.float32)

    return reduce
