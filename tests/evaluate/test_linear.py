"""The linear probe learns linear classes, and nothing from noise."""

import itertools

import chex
import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import helpers
from disco_jax import flags
from disco_jax.data import contract, views
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.evaluate import grid, held_out, linear, probe, scores, subsets
from disco_jax.evaluate.features import Features


def blobs(count, seed, spread=4.0):
    """Draws overlapping Gaussian classes, so that no classifier is perfect."""
    centres = np.random.default_rng(0).normal(size=(5, 16)) * 2
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, count)
    features = (centres[labels] + spread * rng.normal(size=(count, 16))).astype(np.float32)
    return Features(features, features, labels.astype(np.int32))


def config(rate=0.05, epochs=30):
    linear_config = flags.load("configs/linear.py")
    linear_config.learning_rate.base_lr = rate
    linear_config.total_epochs = epochs
    linear_config.learning_rate.milestones = (18, 24)
    return linear_config


def fit(config, train, **options):
    return linear.train(helpers.probe_settings(config), train.features, train.labels, 5, **options)[
        0
    ]


def accuracy(config, train, test):
    return scores.summary(fit(config, train).scores(test.features), test.labels)


def test_agrees_with_logistic_regression():
    train, test = blobs(1500, 1), blobs(1500, 2)
    measured = accuracy(config(), train, test)
    reference = LogisticRegression(max_iter=500).fit(train.features, train.labels)
    expected = 100 * reference.score(test.features, test.labels)
    assert 70 < expected < 99
    assert measured["top1"] == pytest.approx(expected, abs=1.5)
    assert measured["top5"] == 100


def test_labels_without_meaning_give_chance():
    train, test = blobs(800, 1), blobs(800, 2)
    shuffled = Features(
        train.features, train.embedding, np.random.default_rng(3).permutation(train.labels)
    )
    assert accuracy(config(epochs=10), shuffled, test)["top1"] < 45


def test_the_same_seed_gives_the_same_bits():
    train = blobs(300, 1)
    one, two = (fit(config(epochs=3), train) for _ in range(2))
    np.testing.assert_array_equal(one.kernel, two.kernel)


def test_too_few_images_for_the_devices():
    with pytest.raises(UserError, match="fewer than the 4 devices"):
        fit(config(), blobs(3, 1))


def search(config, train):
    """Returns the results of `grid.train`."""
    return grid.train(helpers.probe_settings(config), train.features, train.labels, 5)


def grid_config(**changes):
    recipe = flags.load("linear:protocol=grid")
    recipe.grid.update(rates=(1e-5, 0.05, 1e6), weight_decays=(0.0, 1e-3))
    recipe.update_from_flattened_dict({"total_epochs": 10, **changes})
    return recipe


def test_a_grid_finds_a_rate_that_works_and_survives_those_that_do_not():
    train, test = blobs(1500, 1), blobs(1500, 2)
    layer, result = search(grid_config(total_epochs=30), train)
    assert result["rate"] == 0.05 and len(result["grid"]) == 6
    assert result["held_out_top1"] == max(row["held_out_top1"] for row in result["grid"])
    reference = LogisticRegression(max_iter=500).fit(train.features, train.labels)
    expected = 100 * reference.score(test.features, test.labels)
    measured = scores.summary(layer.scores(test.features), test.labels)["top1"]
    assert measured == pytest.approx(expected, abs=1.5)


def test_every_layer_of_a_grid_is_the_one_trained_alone():
    """Classifiers trained in parallel equal separate ones, with momentum and weight decay."""
    train = blobs(300, 1)
    probe_config = grid_config(total_epochs=3)
    pairs = [(0.02, 0.0), (0.05, 1e-2)]
    settings = helpers.probe_settings(probe_config)
    heads = grid.side_by_side(settings, train.features, train.labels, 5, pairs, {})
    for (rate, decay), (kernel, bias) in zip(pairs, heads, strict=True):
        probe_config.learning_rate.base_lr, probe_config.optimizer.weight_decay = rate, decay
        expected = fit(probe_config, train)
        np.testing.assert_allclose(kernel, expected.kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(bias, expected.bias, rtol=1e-4, atol=1e-6)


def test_a_grid_chooses_by_training_images_alone():
    train = blobs(300, 1)
    strange = Features(train.features, train.embedding, (train.labels + 1) % 5)
    _, one = search(grid_config(), train)
    _, two = probe.linear_probe(helpers.probe_settings(grid_config()), train, strange)
    assert two["grid"] == one["grid"] and two["top1"] < 50


def test_a_cross_validation_holds_every_image_out_once():
    """SEED searches its transfer's rate by 10-fold cross-validation on the training images."""
    train = blobs(300, 1)
    cross = grid_config(total_epochs=5, **{"grid.folds": 3, "grid.weight_decays": (0.0,)})
    layer, result = search(cross, train)
    parts, top1s = subsets.folds(train.labels, 3, cross.seed), []
    for part in range(3):
        alone = grid_config(total_epochs=5)
        alone.learning_rate.base_lr, alone.grid.rates = 0.05, ()
        scored = fit(alone, train.rows(parts != part)).scores(train.features[parts == part])
        top1s.append(scores.top_k(scored, train.labels[parts == part], 1))
    assert result["rate"] == 0.05
    assert result["held_out_top1"] == pytest.approx(np.mean(top1s), abs=0.5)
    alone = grid_config(total_epochs=5)  # trained again on all images
    alone.learning_rate.base_lr, alone.optimizer.weight_decay = 0.05, 0.0
    np.testing.assert_allclose(layer.kernel, fit(alone, train).kernel, rtol=1e-5, atol=1e-6)


def test_what_is_held_out_weighs_nothing_in_a_batch():
    """A step on eight images, three of them held out, equals a step on the other five."""
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(8, 3)).astype("f"), np.arange(8, dtype=np.int32) % 4
    learned = np.array([1, 0, 1, 1, 0, 1, 0, 1], np.float32)
    settings = helpers.probe_settings(grid_config())
    pairs = [(0.5, 0.0), (0.1, 1e-3)]
    probe_plan = linear.plan(settings, 64)
    step, state = grid._parallel_step(
        settings, probe_plan, pairs, (3, 4), lambda _, __, batch: batch["features"]
    )
    batch = {"features": rows, "labels": labels, "learned": learned}
    remaining = {name: x[learned > 0] for name, x in batch.items() if name != "learned"}
    run = jax.jit(lambda state, batch: helpers.single(step, state, {"feature_stats": {}}, batch))
    for _ in range(2):
        marked, metrics = run(state, batch)
        expected, expected_metrics = run(state, remaining)
        chex.assert_trees_all_close(marked, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
        state = marked


def test_marked_batches_know_their_rows_in_every_epoch_and_after_a_restart():
    count = 37
    images = np.zeros((count, 8, 8, 3), np.uint8)
    source = ArraySource({"train": (images, np.arange(count))})  # the label is the row
    out = np.random.default_rng(0).random(count) < 0.4
    crops = dict(enumerate(views.build(helpers.smoke_config("moco_v2").augment, 1).crops))

    def batches(start, many):
        marked = held_out.Marked(source, "train", out).train("train", crops, 8, 3, start, 0)
        return list(itertools.islice(marked, many))

    whole = batches(contract.Position.start(), 11)  # of three epochs
    for batch in whole:
        np.testing.assert_array_equal(batch.aux["learned"], ~out[batch.labels])
    assert {batch.aux["learned"].sum() for batch in whole} != {8.0}
    again = batches(whole[5].position, 5)
    for one, two in zip(whole[6:], again, strict=True):
        np.testing.assert_array_equal(one.aux["learned"], two.aux["learned"])


def test_normalised_rows_have_mean_zero_and_deviation_one():
    train = blobs(400, 1)
    probe_config = config(epochs=5)
    probe_config.normalise = True
    layer = fit(probe_config, train)
    assert set(layer.feature_stats) == {"mean", "deviation"}
    unit = train.features / np.linalg.norm(train.features, axis=1, keepdims=True)
    np.testing.assert_allclose(layer.feature_stats["mean"], unit.mean(0), atol=1e-6)
    np.testing.assert_allclose(layer.feature_stats["deviation"] ** 2, unit.var(0) + 1e-5, rtol=1e-4)
    expected = (unit - layer.feature_stats["mean"]) / layer.feature_stats["deviation"]
    np.testing.assert_allclose(
        layer.scores(train.features), expected @ layer.kernel + layer.bias, rtol=1e-3, atol=1e-4
    )


def test_mirror_images_are_drawn_half_of_the_time():
    rows = np.arange(64, dtype=np.float32)[:, None]
    batches = linear.batches([rows, -rows - 100], np.arange(64, dtype=np.int32), 16, 0)
    mirrored = []
    for _ in range(40):
        tree, _ = next(batches)
        features, labels = (tree[key].reshape(-1) for key in ("features", "labels"))
        mirrored.append(features < 0)
        np.testing.assert_array_equal(np.where(features < 0, -features - 100, features), labels)
    assert 0.4 < np.mean(mirrored) < 0.6


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ("linear", dict(rate=0, epochs=100, steps=(60, 80), factor=0.1, augment="none")),
        ("linear:protocol=disco,student=efficientnet_b0", dict(rate=3, steps=(60, 80))),
        ("linear:protocol=disco,student=resnet34", dict(rate=30, batch=256, decay=0)),
        ("linear:protocol=disco_code", dict(factor=0.5, milestones=11)),
        ("linear:protocol=seed,student=mobilenetv3_large", dict(rate=3, warmup=3)),
        ("linear:protocol=swav", dict(rate=0.3, decay=1e-6, schedule="cosine")),
        ("linear:protocol=dino,student=vit_small_p16", dict(blocks=4, rate=0.001, batch=1024)),
        ("linear:protocol=dino,student=resnet50", dict(blocks=1)),
        ("linear:protocol=sslight,student=mobilenetv2", dict(rate=0.05, batch=4096, name="lars")),
        ("linear:protocol=sslight,student=vit_tiny_p16", dict(rate=0.01, blocks=4, name="sgd")),
        ("linear:protocol=bingo,student=resnet18", dict(rate=30, epochs=120, minimum=0.01)),
        (
            "linear:protocol=bingo,student=efficientnet_b0",
            dict(rate=3, minimum=0.001, schedule="cosine_after"),
        ),
        ("linear:protocol=ressl", dict(rate=0.3, schedule="cosine", every="step")),
        ("linear:protocol=compress", dict(rate=0.01, epochs=40, steps=(15, 30), decay=1e-4)),
        ("semi:protocol=disco,percent=10", dict(rate=3, factor=0.5, labelled=10)),
        ("semi:protocol=seed,student=resnet18", dict(rate=30, augment="flip", labelled=1)),
        ("semi:protocol=retro,student=efficientnet_b1", dict(rate=3, factor=0.1)),
        ("semi:protocol=bingo", dict(rate=10, layers="classifier", augment="linear")),
        ("semi:protocol=sslight,percent=1", dict(rate=0.03, batch=1024, epochs=60, layers="all")),
        ("semi:protocol=sslight,percent=10", dict(epochs=30)),
        ("semi:protocol=swav,percent=1", dict(rate=0.02, head=250, steps=(12, 16), factor=0.2)),
        ("transfer:data=cifar100", dict(rate=3, batch=256, epochs=100)),
        ("transfer:protocol=seed", dict(rate=0.001, epochs=120, schedule="constant", folds=0)),
        ("transfer:protocol=seed_search", dict(epochs=120, schedule="constant", folds=10)),
        (
            "transfer:protocol=seed_search,data=sun397",
            dict(data="sun397/standard-part1-120k", folds=0, held_out=20),
        ),
        ("finetune:protocol=kd,student=mobilenetv2", dict(rate=3, layers="classifier")),
    ],
)
def test_protocols_hold_the_papers_settings(recipe, expected):
    probe = flags.load(recipe)
    rate = probe.learning_rate
    settings = dict(
        rate=rate.base_lr, epochs=probe.total_epochs, steps=rate.milestones, factor=rate.factor,
        milestones=len(rate.milestones), warmup=rate.warmup_from, schedule=rate.decay,
        batch=probe.batch_size, decay=probe.optimizer.weight_decay, name=probe.optimizer.name,
        blocks=probe.blocks, augment=probe.augment, labelled=probe.labelled.percent,
        layers=probe.layers, head=probe.head_rate, minimum=rate.minimum, every=rate.every,
        folds=probe.grid.folds, held_out=probe.grid.held_out_percent, data=probe.data.name,
    )  # fmt: skip
    assert {key: settings[key] for key in expected} == expected
    with pytest.raises(UserError, match="protocol"):
        flags.load(f"{recipe.partition(':')[0]}:protocol=sead")
