"""Run the quick start: teacher, baseline and DisCo on real digits, with a table and a figure."""

import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from disco_jax import programs, typed
from disco_jax.data import digits, pipeline
from disco_jax.data.contract import Source
from disco_jax.evaluate import features, probe
from disco_jax.evaluate.probe_settings import ProbeSettings
from disco_jax.run import metrics
from disco_jax.train.experiment import parse
from disco_jax.workflows import pretrain

RUNS = ("teacher", "moco_v2", "disco")
TITLES = {
    "untrained": "student, untrained",
    "moco_v2": "student, MoCo-v2 alone",
    "disco": "student, DisCo",
    "teacher": "teacher, MoCo-v2",
}
Scores = dict[str, float]


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains and scores all networks; a restart resumes where the demo stopped.

    Args:
      config: see `configs/demo.py`.
      workdir: receives data/, seed_N/{teacher,moco_v2,disco}/, results.json and figure.png.

    Returns:
      The content of results.json: for each of "teacher", "moco_v2", "disco" and "untrained"
      {"linear_top1", "knn_top1"} in percent (means over the seeds, with "..._spread", the
      standard deviation, if there are several), and the seeds and seconds.
    """
    started = time.monotonic()
    path = epath.Path(workdir)
    data_dir = path / "data"
    digits.write(str(data_dir))
    programs.settle(path)
    by_seed = {seed: _run_seed(config, seed, path, data_dir) for seed in config.seeds}
    results: dict[str, Any] = {name: _summary(by_seed, name) for name in TITLES}
    results["seeds"] = list(config.seeds)
    if len(by_seed) > 1:
        results["by_seed"] = {str(seed): scores for seed, scores in by_seed.items()}
    results["seconds"] = round(time.monotonic() - started, 1)
    (path / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _draw(results, path / f"seed_{config.seeds[0]}", path / "figure.png")
    print(_table(results))
    print(
        f"\nTook {results['seconds']:.0f} s. Figures: {path / 'results.json'}, "
        f"picture: {path / 'figure.png'}, runs: {path}/seed_*"
    )
    return results


def _run_seed(
    config: ConfigDict, seed: int, path: epath.Path, data_dir: epath.Path
) -> dict[str, Scores]:
    """Trains the three networks with one seed; scores them and an untrained student."""
    folder = path / f"seed_{seed}"
    scores = {}
    for name in RUNS:
        run_config = config[name].copy_and_resolve_references()
        run_config.seed = seed
        run_config.data.dir = str(data_dir)
        if name == "disco":
            run_config.teacher.weights = str(folder / "teacher")
        print(f"\n== {TITLES[name]}, seed {seed}", flush=True)
        settings = parse(run_config)
        source = pipeline.open_source(settings.data)
        pretrain.run(run_config, str(folder / name), source)
        scores[name] = _score(config, features.load(str(folder / name)), source)
    scores["untrained"] = _score(config, features.untrained(settings), source)
    return scores


def _score(config: ConfigDict, trained: features.TrainedModel, source: Source) -> Scores:
    """Returns linear and kNN top-1 on the held-out images, in percent."""
    data, batch = trained.settings.data, config.knn.batch_size
    train = features.of_split(trained, source, data.train_split, batch)
    test = features.of_split(trained, source, data.eval_split, batch)
    linear = typed.parse(ProbeSettings, config.linear, "config.linear", defaults=True)
    _, probed = probe.linear_probe(linear, train, test)
    voting = {name: config.knn[name] for name in probe.KNN_FIELDS}
    return {
        "linear_top1": round(probed["top1"], 2),
        "knn_top1": round(probe.knn_probe(train, test, **voting)["top1"], 2),
    }


def _summary(by_seed: Mapping[int, Mapping[str, Scores]], name: str) -> Scores:
    """Returns the means over the seeds, and the standard deviations if there are several."""
    out = {}
    for score in ("linear_top1", "knn_top1"):
        values = [scores[name][score] for scores in by_seed.values()]
        out[score] = round(statistics.fmean(values), 2)
        if len(values) > 1:
            out[f"{score}_spread"] = round(statistics.stdev(values), 2)
    return out


def _table(results: Mapping[str, Any]) -> str:
    seeds = results["seeds"]
    lines = [
        f"\nTop-1 on 360 held-out digits, percent, seed{'s' if len(seeds) > 1 else ''} "
        + ", ".join(map(str, seeds)),
        f"  {'':24}  {'linear':>14}  {'kNN':>14}",
    ]
    for name, title in TITLES.items():
        cells = []
        for score in ("linear_top1", "knn_top1"):
            spread = results[name].get(f"{score}_spread")
            text = f"{results[name][score]:.1f}"
            cells.append(text if spread is None else f"{text} +- {spread:.1f}")
        lines.append(f"  {title:24}  {cells[0]:>14}  {cells[1]:>14}")
    return "\n".join(lines)


def _draw(results: Mapping[str, Any], folder: epath.Path, file: epath.Path) -> None:
    """Plots the loss curves of one seed next to the accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {
        "untrained": "#b0b0b0",
        "moco_v2": "#e08214",
        "disco": "#1b7837",
        "teacher": "#2166ac",
    }
    figure, (losses, bars) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in RUNS:
        lines, _ = metrics.read(folder / name / metrics.FILE)
        losses.plot(
            [line["epoch"] for line in lines],
            [line["contrast/loss"] for line in lines],
            color=colours[name],
            label=TITLES[name],
        )
    losses.set(xlabel="epoch", ylabel="InfoNCE (nats)", title=f"Contrastive loss, {folder.name}")
    losses.legend(frameon=False)
    for i, score in enumerate(("linear_top1", "knn_top1")):
        for j, name in enumerate(TITLES):
            value = results[name][score]
            bar = bars.bar(
                i * 5 + j,
                value,
                color=colours[name],
                yerr=results[name].get(f"{score}_spread"),
                label=TITLES[name] if i == 0 else None,
            )
            bars.bar_label(bar, fmt="%.1f", padding=2, fontsize=8)
    bars.set(
        xticks=(1.5, 6.5),
        xticklabels=("linear probe", "kNN"),
        ylim=(0, 128),
        yticks=range(0, 101, 20),
        ylabel="top-1 on held-out digits (%)",
        title="Accuracy of the frozen features",
    )
    bars.legend(frameon=False, ncols=2, fontsize=8, loc="upper center")
    for axes in (losses, bars):
        axes.spines[["top", "right"]].set_visible(False)
    with file.open("wb") as target:
        figure.savefig(target, format="png", dpi=130)
    pyplot.close(figure)
