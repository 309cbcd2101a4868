"""Tests of probes, few labels, transfer and fine-tuning, from config to result files."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

import helpers
from disco_jax import flags
from disco_jax.commands import importing, knn, linear
from disco_jax.convert import pickles
from disco_jax.data.arrays import ArraySource
from disco_jax.data.subset import SubsetSource
from disco_jax.errors import UserError
from disco_jax.evaluate import features, online, probe_settings, saved, subsets, target


@pytest.fixture(scope="module", autouse=True)
def shared_programs(tmp_path_factory):
    """Enables the compilation cache, as the command line does."""
    with helpers.programs_kept(tmp_path_factory.mktemp("programs")), helpers.tiny_networks():
        yield


def few(count=96):
    """Returns the first digits, which contain all classes."""
    return {
        key: value[: count if key.startswith("train") else 60]
        for key, value in helpers.digits().items()
    }


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(path, **few())
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_file):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return helpers.network_run(folder, data_file, **{"student.hidden": 24})


def quick(recipe, **changes):
    """Returns a recipe with two epochs of small batches."""
    config = flags.load(recipe)
    short = {"total_epochs": 2, "batch_size": 32, "learning_rate.base_lr": 0.5}
    config.update_from_flattened_dict({**short, **changes})
    return config


def metrics(run, name):
    lines = pathlib.Path(run, name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_cached_probe_leaves_what_it_found(run):
    result = linear.run(quick("linear", total_epochs=20, evaluate_every_epochs=5), run)
    assert (result["protocol"], result["cached"]) == ("linear:cached", True)
    written = json.loads(pathlib.Path(run, "linear.json").read_text())
    assert written == result
    assert result["images"] == 60 and len(result["class_top1"]) == 10
    low, high = result["top1_interval"]
    assert low < result["top1"] < high and result["best_top1"] >= result["top1"]
    with np.load(f"{run}/linear.npz") as arrays:
        assert arrays["confusion"].sum() == 60
        assert 100 * np.trace(arrays["confusion"]) / 60 == pytest.approx(result["top1"])


def test_crops_and_flips_go_through_the_same_loop_and_leave_the_network_alone(run):
    config = quick("linear:protocol=moco", evaluate_every_epochs=1)
    result = linear.run(config, run)
    assert (result["protocol"], result["cached"]) == ("linear:moco", False)
    lines = metrics(run, "linear_moco")
    assert [line["step"] for line in lines if "test/top1" in line] == [3, 6]
    assert result["best_top1"] == max(line.get("test/top1", 0) for line in lines)
    teacher = saved.read(f"{run}/linear_moco")
    jax.tree.map(
        np.testing.assert_array_equal, teacher.trained.variables, features.load(run).variables
    )
    config.seed = 1
    with pytest.raises(UserError, match=r"evaluation.seed: 0 -> 1[\s\S]*config.name"):
        linear.run(config, run)
    config.seed = 0
    assert linear.run(config, run) == result  # nothing is trained again


def test_a_grid_on_crops_searches_then_trains_what_it_found(run):
    config = quick("linear:protocol=grid_crops", **{"learning_rate.base_lr": 50.0})
    config.grid.update(rates=(1e-6, 50.0), weight_decays=(0.0,), held_out_percent=30.0)
    result = linear.run(config, run)
    assert result["rate"] == 50.0 and len(result["grid"]) == 2
    assert result["held_out_top1"] > result["grid"][0]["held_out_top1"]
    for name in ("linear_grid_crops_search", "linear_grid_crops"):
        assert metrics(run, name)[-1]["step"] == 6  # two epochs of three batches
    alone = quick("linear:protocol=moco", name="alone")
    for field in ("learning_rate", "optimizer", "total_epochs", "batch_size"):
        alone[field] = config[field]
    linear.run(alone, run)
    with np.load(f"{run}/alone.npz") as one, np.load(f"{run}/linear_grid_crops.npz") as two:
        np.testing.assert_array_equal(one["kernel"], two["kernel"])
    assert linear.run(config, run) == result  # nothing is trained again


@pytest.mark.parametrize("recipe", ["linear:protocol=moco", "finetune"])
def test_devices_do_not_change_what_is_learned(run, recipe):
    """Compares one device with four, with partial last batches of test images."""
    trained = features.load(run)
    # Small rates, at which rounding errors do not grow from step to step.
    config = quick(recipe, **{"learning_rate.base_lr": 0.05, "head_rate": 2.0})
    settings, outputs = helpers.probe_settings(config), []
    for devices in (1, 4):
        with helpers.devices(devices):
            network, layer = online.train(settings, trained, ArraySource(splits()), None)
            test = features.of_split(network, ArraySource(splits()), "test", 24)
            outputs.append((layer.scores(test.features), test.labels))
    np.testing.assert_array_equal(outputs[0][1], few()["test_labels"])
    np.testing.assert_array_equal(outputs[0][1], outputs[1][1])
    np.testing.assert_allclose(outputs[0][0], outputs[1][0], rtol=1e-4, atol=1e-5)


def splits():
    digits = few()
    return {s: (digits[f"{s}_images"], digits[f"{s}_labels"]) for s in ("train", "test")}


def test_the_same_few_of_every_class_are_read(run):
    source = ArraySource(splits())
    rows = [3, 17, 40]
    some = SubsetSource(source, "train", rows)
    assert some.count("train") == 3 and some.count("test") == 60
    labels = [label for *_, label in some.iter_images("train")]
    assert labels == few()["train_labels"][rows].tolist()
    result = linear.run(
        quick("semi:protocol=seed,percent=10", **{"labelled.percent": 50.0, "batch_size": 8}), run
    )
    assert result["name"] == "semi_seed_10" and result["images"] == 60
    assert result["trained_on"] == {"images": 40, "selection": "4 of each class, drawn with seed 0"}


@pytest.mark.parametrize("recipe", ["linear", "linear:protocol=moco"])
def test_held_out_training_images_are_tested_on_and_not_learned(run, recipe):
    """SSLight chooses its settings on 50 training images of each class."""
    (images, labels), tests = splits()["train"], splits()["test"]
    rows = subsets.balanced(labels, 2, seed=3)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    spoilt = np.where(np.isin(np.arange(len(images)), rows)[:, None, None], noise, images)
    kernels = []
    for i, pixels in enumerate((images, spoilt)):
        config = quick(recipe, name=f"held_{recipe[-4:]}_{i}")
        config.held_out.update(per_class=2, seed=3)
        source = ArraySource({"train": (pixels, labels), "test": tests})
        result = linear.run(config, run, source)
        assert result["images"] == 20
        assert result["tested_on"] == "2 training images of each class, drawn with seed 3"
        with np.load(f"{run}/{config.name}.npz") as arrays:
            kernels.append(arrays["kernel"])
            assert arrays["confusion"].sum(1).tolist() == [2] * 10
    np.testing.assert_array_equal(*kernels)


def test_all_layers_with_the_heads_hidden_layer_then_a_student_of_them(run, tmp_path, data_file):
    """Runs SSLight's fine-tuning, then distils its network into another run."""
    config = quick("semi:protocol=sslight,percent=10", **{"labelled.percent": 0.0})
    result = linear.run(config, run)
    name = "semi_sslight_10"
    teacher = saved.read(f"{run}/{name}")
    before, after = features.load(run).variables, teacher.trained.variables
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before["params"]["backbone"],
                         after["params"]["backbone"])  # fmt: skip
    assert all(jax.tree.leaves(moved))
    assert teacher.classifier.kernel.shape == (24, 10)  # the head's hidden width
    trained = features.load(run)
    fine = online.Teacher(teacher.trained, teacher.classifier, "hidden", 1)
    test = features.of_split(fine.trained, ArraySource(splits()), "test", 32, ("hidden",))
    correct = fine.classifier.scores(test.hidden).argmax(1) == test.labels
    assert 100 * correct.mean() == pytest.approx(result["top1"])
    assert trained.settings.student.backbone == "tiny"

    other = helpers.network_run(tmp_path / "student", data_file, seed=5)
    config = quick("finetune:protocol=kd", **{"distill.teacher": f"{run}/{name}"})
    linear.run(config, other)
    distilled = pathlib.Path(other, "linear_kd", "metrics.jsonl").read_text()
    config = quick("linear:protocol=moco", name="plain")
    linear.run(config, other)
    assert distilled != pathlib.Path(other, "plain", "metrics.jsonl").read_text()


def test_a_vit_is_imported_and_probed_by_its_class_tokens(tmp_path, data_file):
    """Runs DINO's protocol: a probe on the last four blocks concatenated, kNN on the last one."""
    file, run = tmp_path / "vit.pth", tmp_path / "vit"
    pickles.write(file, helpers.recorded_state("dino_vit_tiny_p16")[2])
    importing.run(str(file), str(run))
    on_digits = {"data.dir": str(data_file), "data.size": 32, "report": False}
    near = flags.load("knn:protocol=dino")
    near.update_from_flattened_dict({**on_digits, "network": "student"})
    assert knn.run(near, str(run))["top1"] > 30  # chance is 10
    config = quick("linear:protocol=dino,student=vit_tiny_p16", augment="none", **on_digits)
    with pytest.raises(UserError, match=r"--config\.network=student"):
        linear.run(config, str(run))
    config.update(network="student", total_epochs=20)
    result = linear.run(config, str(run))
    with np.load(run / "linear_dino.npz") as arrays:
        assert arrays["kernel"].shape == (4 * 192, 10)
        kernel, bias = arrays["kernel"], arrays["bias"]
    data = probe_settings.eval_data(config.data)
    trained, source = target.opened(target.with_eval_data(features.load(str(run)), data))
    rows = {
        blocks: features.of_split(trained, source, "test", 64, ("features",), blocks)
        for blocks in (1, 4)
    }
    np.testing.assert_allclose(rows[4].features[:, -192:], rows[1].features, rtol=1e-4, atol=1e-5)
    correct = (rows[4].features @ kernel + bias).argmax(1) == rows[4].labels
    assert 100 * correct.mean() == pytest.approx(result["top1"]) and result["top1"] > 30


def test_transfer_reads_another_data_set_at_its_own_size(run, tmp_path):
    images = few()
    other = tmp_path / "other.npz"
    np.savez(other, **images)
    config = quick("transfer:data=other,protocol=seed")
    config.data.update(name="", dir=str(other), size=24, eval_resize=24)
    assert linear.run(config, run)["data"] == "other"
    assert pathlib.Path(run, "transfer_seed_other.json").exists()


@pytest.mark.parametrize(
    "recipe, changes, says",
    [
        ("linear", {"output": "hiden"}, "Did you mean 'hidden'"),
        ("linear", {"blocks": 4}, "tiny allows only 1"),
        ("linear", {"augment": "crops"}, "config.augment='crops'"),
        ("linear", {"network": "momentum"}, "--config.network=student"),
        ("linear", {"init": "zeros"}, "config.init='zeros'"),
        ("linear", {"data.eval_split": "tset"}, "Did you mean 'test'"),
        ("linear", {"data.dir": "/no/such.npz"}, "no file /no/such.npz"),
        ("linear", {"labelled.per_class": 50}, "fewer than the 50"),
        ("linear", {"labelled.per_class": 5, "labelled.percent": 5.0}, "set one of them to 0"),
        ("linear:protocol=disco,student=resnet18", {}, "student=tiny"),
        ("linear:protocol=moco", {"norm": "sync"}, "the network is frozen"),
        ("linear:protocol=grid", {"augment": "flip"}, "set augment to none or linear"),
        ("linear:protocol=grid_crops", {"layers": "all"}, "layers to classifier"),
        ("linear:protocol=grid", {"optimizer.name": "lars"}, "trains with sgd"),
        ("finetune", {"augment": "none"}, "--config.augment=linear"),
        ("finetune", {"held_out.per_class": 1}, "config.layers=classifier"),
        ("linear:protocol=grid_crops", {"grid.folds": 3}, "--config.augment=none"),
        ("linear", {"held_out.per_class": 50}, "fewer than the 50"),
        ("finetune", {"normalise": True}, "Set it to False"),
        ("finetune", {"norm": "shuffle"}, "config.norm='shuffle'"),
        ("finetune", {"layers": "some"}, "config.layers='some'"),
        ("finetune:protocol=kd", {}, "needs both"),
        ("finetune", {"distill.weight": 2.0}, "0..1"),
        ("finetune:protocol=kd", {"distill.teacher": "no/such"}, "there is no no/such.npz"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(run, recipe, changes, says):
    with pytest.raises(UserError) as caught:
        linear.run(quick(recipe, **{**changes, "name": "wrong"}), run)
    assert says in str(caught.value)
    assert not pathlib.Path(run, "wrong").exists()


def test_data_that_will_not_do(run):
    digits = few()
    images, labels = digits["train_images"], digits["train_labels"]
    tests = digits["test_images"], digits["test_labels"]
    cases = {
        "images without a label": ArraySource({"train": (images, None), "test": (tests[0], None)}),
        "have no training image": ArraySource(
            {"train": (images[labels > 0], labels[labels > 0]), "test": tests}
        ),
    }
    for says, source in cases.items():
        for recipe in ("linear", "linear:protocol=moco"):
            with pytest.raises(UserError, match=says):
                linear.run(quick(recipe, name="wrong"), run, source)
    empty = ArraySource(splits())
    empty.count = lambda split: 0
    with pytest.raises(UserError, match="is empty"):
        linear.run(quick("linear", name="wrong"), run, empty)
    with pytest.raises(UserError, match="without a head"):
        features.check_outputs(with_student(run, head="none"), ("embedding",))
    with pytest.raises(UserError, match="no hidden layer"):
        features.check_outputs(with_student(run, head="mlp", hidden=0), ("hidden",))
    assert not pathlib.Path(run, "wrong").exists()


def with_student(run, **changes):
    """Returns the network of a run whose settings state another head."""
    loaded = features.load(run)
    student = dataclasses.replace(loaded.settings.student, **changes)
    settings = dataclasses.replace(loaded.settings, student=student)
    return dataclasses.replace(loaded, settings=settings)


def test_a_teacher_of_other_classes_is_refused(run, tmp_path, data_file):
    linear.run(quick("linear", name="ten"), run)
    five = {s: (x[y < 5], y[y < 5]) for s, (x, y) in splits().items()}
    assert few()["train_labels"].max() == 9
    config = quick("finetune:protocol=kd", **{"distill.teacher": f"{run}/ten", "name": "wrong"})
    with pytest.raises(UserError, match="has 10 classes, arrays has 5"):
        linear.run(config, run, ArraySource(five))
