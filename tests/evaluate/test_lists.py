"""Few labels on ImageNet: the papers' lists by file name, or a draw that is said to be one."""

import dataclasses
import types

import numpy as np
import pytest
from PIL import Image

import helpers
from disco_jax import flags
from disco_jax.data import lists, pipeline
from disco_jax.data.arrays import ArraySource
from disco_jax.data.data_settings import DataSettings
from disco_jax.errors import UserError
from disco_jax.evaluate import target

# Percent -> (images of a class, classes with so many), as in SimCLR's lists.
SIZES = {1: ((12, 189), (13, 811)), 10: ((128, 884), (129, 116))}


def stand_in(percent):
    """Returns made-up names in the form of SimCLR's list."""
    sizes = [size for size, classes in SIZES[percent] for _ in range(classes)]
    return [f"n{c:08}_{i}.JPEG" for c, size in enumerate(sizes) for i in range(size)]


def settings(percent, file="", **changes):
    """Returns the images of a run of ImageNet and `config.labelled` of `semi`."""
    argument = f",list={file}" if file else ""
    config = flags.load(f"semi:percent={percent}{argument}")
    config.update_from_flattened_dict(changes)
    labelled = helpers.probe_settings(config).labelled
    return DataSettings(name="imagenet2012", subset=config.data.subset), labelled


@pytest.mark.parametrize("percent, count", [(1, 12_811), (10, 128_116)])
def test_the_papers_lists_are_read_whole(percent, count, tmp_path):
    file = tmp_path / f"{percent}percent.txt"
    file.write_text("\n".join(stand_in(percent)) + "\n")
    data, labelled = settings(percent, file)
    names = {line.file for line in lists.read(data.subset, "config.data.subset")}
    assert len(names) == count and labelled.percent == 0.0
    source = types.SimpleNamespace(count=lambda split: len(names), name="imagenet2012")
    few, about = target.few_labels(source, data, labelled)
    assert few is source
    assert about == {"images": count, "selection": f"the list {file}"}
    names.pop()  # DisCo's script drops the first line
    with pytest.raises(UserError, match=rf"has {count - 1} images, .* {count}: .*listed=0"):
        target.few_labels(source, data, labelled)
    labelled = dataclasses.replace(labelled, listed=0)
    assert target.few_labels(source, data, labelled)[1]["images"] == count - 1


def test_a_list_selects_files_of_a_folder_by_name(tmp_path):
    names = stand_in(1)[:40]
    for name in names:
        place = tmp_path / "images" / "train" / name.partition("_")[0]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(place / name)
    file = tmp_path / "few.txt"
    file.write_text("\n".join(names[::3]) + "\n")
    data = DataSettings(source="folder", dir=str(tmp_path / "images"), subset=str(file))
    source = pipeline.open_source(data)
    assert [name.rpartition("/")[2] for name, *_ in source.iter_images("train")] == names[::3]
    file.write_text("\n".join([*names[::3], "n99999999_1.JPEG", "n99999999_2.JPEG"]))
    with pytest.raises(UserError, match=r"2 of 16 file names .* e\.g\. 'n99999999_1\.JPEG'"):
        pipeline.open_source(data)


def test_a_list_and_a_draw_contradict_each_other(tmp_path):
    source = types.SimpleNamespace(count=lambda split: 12_811, name="imagenet2012")
    data, labelled = settings(1, **{"data.subset": "1percent.txt"})
    with pytest.raises(UserError, match=r"subset='1percent.txt' has .*labelled\.percent=0"):
        target.few_labels(source, data, labelled)
    data, labelled = settings(1)
    # TFDS's data set of the same images.
    data = dataclasses.replace(data, name="imagenet2012_subset/1pct")
    with pytest.raises(UserError, match=r"imagenet2012_subset/1pct has .*labelled\.percent=0"):
        target.few_labels(source, data, labelled)
    labelled = dataclasses.replace(labelled, percent=0.0)
    assert target.few_labels(source, data, labelled)[1]["images"] == 12_811


def test_a_draw_is_said_to_be_one():
    labels = np.repeat(np.arange(4), 50)
    source = ArraySource({"train": (np.zeros((200, 4, 4), np.uint8), labels)})
    data, labelled = settings(10)
    few, about = target.few_labels(source, data, labelled)
    assert few.count("train") == about["images"] == 20
    assert about["selection"] == (
        "5 of each class, drawn with seed 0; the papers' list has 128116 images"
    )
    data = dataclasses.replace(data, name="digits")
    assert target.few_labels(source, data, labelled)[1]["selection"].endswith("seed 0")
