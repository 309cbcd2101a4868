"""Data of an evaluation: the run's or another data set, checked before training starts."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import helpers
from disco_jax import flags
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.evaluate import features, probe_settings, target


@pytest.fixture(scope="module")
def trained():
    with helpers.tiny_backbone():
        return features.untrained(helpers.smoke_settings("moco_v2", **{"student.backbone": "tiny"}))


def data(**changes):
    data_config = flags.load("linear").data
    data_config.update(changes)
    return probe_settings.eval_data(data_config)


def test_nothing_asked_is_the_runs_own(trained):
    own = target.with_eval_data(trained, data()).settings
    assert own == trained.settings


def test_a_folder_of_pictures_is_read_at_its_own_size(trained, tmp_path):
    for split in ("train", "val"):
        for label, level in (("dark", 20), ("light", 220)):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((30, 20, 3), level + i, np.uint8)).save(folder / f"{i}.png")
    retargeted = target.with_eval_data(
        trained, data(dir=str(tmp_path), size=24, interpolation="bicubic")
    )
    resolved = retargeted.settings.data
    assert resolved.source == "folder" and resolved.eval_resize == 24
    retargeted, source = target.opened(retargeted)
    assert retargeted.settings.data.eval_split == "validation" and source.num_classes == 2
    encoded = features.of_split(retargeted, source, "validation", 4, ("features",))
    assert encoded.labels.tolist() == [0, 0, 0, 1, 1, 1] and encoded.embedding.shape == (6, 0)
    target.check_labels(source, "train", "validation", thorough=True)


def test_a_list_of_file_names_says_which_images_are_labelled(trained, tmp_path):
    """A list of file names, like SimCLR's for ImageNet, selects training images only."""
    for split in ("train", "val"):
        for label, level in (("dark", 20), ("light", 220)):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                image = np.full((16, 16, 3), level + i, np.uint8)
                Image.fromarray(image).save(folder / f"{label}_{i}.png")
    names = ["dark_1.png", "dark_3.png", "light_0.png"]
    listed = tmp_path / "few.txt"
    listed.write_text("\n".join(names) + "\n")
    data_fields = data(dir=str(tmp_path / "pictures"), subset=str(listed))
    retargeted, source = target.opened(target.with_eval_data(trained, data_fields))
    assert (source.count("train"), source.count("validation")) == (3, 8)
    assert [name.rsplit("/")[-1] for name, _, _ in source.iter_images("train")] == names
    encoded = features.of_split(retargeted, source, "train", 4, ("features",))
    assert encoded.labels.tolist() == [0, 0, 1]


def test_answers_about_the_runs_data_are_not_those_about_others(trained):
    stored = dataclasses.replace(
        trained.settings.data, splits="train=a", labels="a.txt", range="image"
    )
    settings = dataclasses.replace(trained.settings, data=stored)
    trained = dataclasses.replace(trained, settings=settings)
    own, other, overridden = (
        target.with_eval_data(trained, data(**changes)).settings.data
        for changes in (
            {},
            {"dir": "photos"},
            {"dir": "photos", "splits": "test=b", "range": "0,9"},
        )
    )
    assert (own.splits, own.labels, own.range) == ("train=a", "a.txt", "image")
    assert (other.splits, other.labels, other.range) == ("", "", "full")
    assert (overridden.splits, overridden.labels, overridden.range) == ("test=b", "", "0,9")


@pytest.mark.parametrize(
    "changes, kind", [({"name": "cifar10"}, "tfds"), ({"dir": "some.npz"}, "npz")]
)
def test_the_kind_of_a_source_follows_from_what_is_given(trained, changes, kind):
    resolved = target.with_eval_data(
        trained, data(**changes, subset="list.txt", eval_resize=0)
    ).settings.data
    assert (resolved.source, resolved.train_split, resolved.subset) == (kind, "train", "list.txt")
    assert resolved.eval_resize == 0


def test_the_split_to_test_on_is_told_where_it_is_not_plain(trained):
    pair = (np.zeros((4, 9, 9), np.uint8), np.arange(4))
    unclear = target.with_eval_data(trained, data(dir="x.npz"))
    for names in (("train",), ("train", "test", "validation")):
        source = ArraySource(dict.fromkeys(names, pair))
        with pytest.raises(UserError, match="eval_split is not set"):
            target.opened(unclear, source)


@pytest.mark.parametrize(
    "name, size, resize",
    [
        ("imagenet2012_subset/1pct", 224, 256),
        ("imagenet2012_subset/10pct", 224, 256),
        ("imagenet2012", 224, 256),
        ("imagenet2012", 96, 96),
        ("fashion_mnist", 28, 0),
        ("cifar10", 224, 224),
    ],
)
def test_another_data_set_is_resized_as_its_family(trained, name, size, resize):
    fields = target.with_eval_data(trained, data(name=name, size=size)).settings.data
    assert fields.eval_resize == resize
    config = flags.load(f"moco_v2:data={name}")
    if size == config.augment.size:
        assert config.data.eval_resize == (256 if name == "cifar10" else resize)


def test_tests_may_be_resized_by_another_filter_than_crops(trained):
    """DINO's official code: bilinear crops in training, a bicubic resize in evaluation."""
    probe = flags.load("linear:protocol=dino")
    assert (probe.data.interpolation, probe.data.eval_interpolation) == ("bilinear", "bicubic")
    changed = target.with_eval_data(trained, probe_settings.eval_data(probe.data))
    assert changed.settings.augment.interpolation == "bilinear"
    assert features.eval_interpolation(changed.settings) == "bicubic"
    own = target.with_eval_data(changed, data(interpolation="bilinear"))
    assert features.eval_interpolation(own.settings) == "bilinear"
    assert features.eval_interpolation(trained.settings) == trained.settings.augment.interpolation


def test_the_filter_of_evaluations_is_pillows(trained):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 40, 30, 3), np.uint8)
    source = ArraySource({"test": (list(images), np.arange(3))})
    for name, resample in (("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)):
        fields = data(interpolation="bilinear", eval_interpolation=name, size=16, eval_resize=20)
        settings = target.with_eval_data(trained, fields).settings
        batches = source.evaluate("test", 16, 20, features.eval_interpolation(settings), 3)
        for image, cropped in zip(images, next(iter(batches))["image"], strict=True):
            small = Image.fromarray(image).resize((20, 26), resample)
            np.testing.assert_array_equal(cropped, np.asarray(small)[5:21, 2:18])
