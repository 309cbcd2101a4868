"""Tests of `distill`: from a folder of images and a teacher to a student, without TensorFlow."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import disco_jax
import helpers
from disco_jax.commands import distill
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.workflows import pretrain

# Checks settings, messages and files; no number is compared with an independent reference.
pytestmark = pytest.mark.wiring


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with helpers.tiny_networks():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The digits as PNG files in train/ and test/, with one folder per class."""
    root = tmp_path_factory.mktemp("images")
    digits = helpers.digits()
    for split, count in (("train", 160), ("test", 40)):
        for i in range(count):
            label = digits[f"{split}_labels"][i]
            path = root / split / f"digit {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits[f"{split}_images"][i]).save(path)
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Directory of a short pretraining run."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    config = helpers.smoke_config("moco_v2", batch_size=16)
    pretrain.run(config, str(run), ArraySource(helpers.digits_splits()))
    return run


def test_settings_follow_the_teacher_and_the_images(folder, teacher):
    config, source = distill.resolve(data=str(folder), teacher=str(teacher), student="resnet14")
    assert source.count("train") == 160 and config.data.eval_split == "test"
    assert config.data.source == "folder" and config.student.backbone == "resnet14"
    assert config.student.stem == "small" and config.augment.size == 16
    assert config.teacher.width == 4 and config.student.dim == config.teacher.dim == 16
    assert config.batch_size == 20  # an eighth of 160 images, on 4 devices
    assert config.objectives.contrast.queue_size == 160


def test_a_pattern_of_names_is_data_too(folder, teacher):
    pattern = str(folder / "train" / "**" / "*.png")
    config, source = distill.resolve(data=pattern, teacher=str(teacher), student="resnet14")
    assert config.data.source == "folder" and source.count("train") == 160
    with pytest.raises(UserError, match="matches no images"):
        distill.resolve(data=str(folder / "*.bmp"), teacher=str(teacher), student="resnet14")


def test_questions_about_the_data_are_answered_by_the_config(folder, teacher, tmp_path):
    """Opens data whose splits must be named in the config."""
    (tmp_path / "digits").mkdir()
    for name in ("test", "dev"):
        (tmp_path / "digits" / name).symlink_to(folder / "test", target_is_directory=True)
    (tmp_path / "digits" / "data").symlink_to(folder / "train", target_is_directory=True)
    inputs = dict(data=str(tmp_path / "digits"), teacher=str(teacher), student="resnet14")
    splits = "train=data,test=test"
    config, source = distill.resolve(**inputs, opening={"splits": splits})
    assert (source.count("train"), source.count("test")) == (160, 40)
    assert config.data.splits == splits and config.data.eval_split == "test"
    assert source.skipped.counts["outside the splits"] == 40


def test_from_folder_to_student_through_the_python_api(folder, teacher, tmp_path, capsys):
    result = disco_jax.distill(
        data=str(folder),
        teacher=str(teacher),
        student="tiny",
        workdir=str(tmp_path / "run"),
        total_steps=2,
        log__report=False,
        student__width=4,
        student__hidden=16,
    )
    assert result["step"] == 2
    out = capsys.readouterr().out
    assert "Resolved config" in out and '"batch_size": 20' in out
    assert (tmp_path / "run" / "checkpoints" / "2").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"student": "resnet19"}, "--student='resnet19'"),
        ({"data": "/no/such"}, "--data=/no/such does not exist"),
        ({"teacher": "/no/such"}, "--teacher=/no/such does not exist"),
    ],
)
def test_mistakes(folder, teacher, changes, message):
    inputs = {"data": str(folder), "teacher": str(teacher), "student": "resnet8", **changes}
    with pytest.raises(UserError, match=message):
        distill.resolve(**inputs)


def test_a_teacher_of_another_shape_is_refused(teacher, tmp_path):
    config = helpers.smoke_config("disco", **{"teacher.weights": str(teacher), "batch_size": 16})
    config.teacher.width = 8
    with pytest.raises(UserError, match=r"config\.teacher\.width=8, but the weights have 4"):
        pretrain.run(config, str(tmp_path / "run"), ArraySource(helpers.digits_splits()))
    assert not (tmp_path / "run").exists()


def test_the_students_queue_starts_as_the_teachers(teacher, tmp_path):
    """Checks disagreement D3: the official code loads the queue from the teacher's file."""
    source = ArraySource(helpers.digits_splits())
    config = helpers.smoke_config("disco", **{"teacher.weights": str(teacher), "batch_size": 16})
    config.teacher.hidden = -1
    queue = pretrain.prepare(config, source).teacher.queue
    assert queue.vectors.shape == (64, 16) and queue.pointer == 32  # two steps of 16
    ready = pretrain.prepare(config, source)
    create = lambda: ready.experiment.initial_state(ready.built, queue=queue)  # noqa: E731
    begin = create().memory["contrast"]["view_1"]
    # Oldest key first, since the student's batch size may differ from the teacher's.
    np.testing.assert_array_equal(begin.vectors, np.roll(queue.vectors, -32, axis=0))
    assert begin.pointer == 0
    config.objectives.contrast.queue_init = "random"
    ready = pretrain.prepare(config, source)
    assert not np.allclose(create().memory["contrast"]["view_1"].vectors, queue.vectors)


def test_training_and_evaluation_from_memory_never_import_tensorflow(folder, teacher, tmp_path):
    code = f"""
import sys
sys.path[:0] = {[str(helpers.PARITY.parent), str(helpers.PARITY)]}
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None  # importing would raise
import helpers
from disco_jax import main
run = ["--workdir={tmp_path / "run"}"]
words = ["distill", "--data={folder}", "--teacher={teacher}", "--student=tiny"]
small = ["--config.total_steps=2", "--config.student.width=4", "--config.student.hidden=16"]
small.append("--config.log.report=false")  # the probe writes a report
with helpers.tiny_networks():
    assert main.main([*words, *small, *run]) == 0
    assert main.main(["knn", "--config.k=5", "--config.report=false", *run]) == 0
    assert main.main(["linear", "--config.total_epochs=2", *run]) == 0
assert sys.modules["tensorflow"] is None
"""
    environment = {**os.environ, "XLA_FLAGS": helpers.one_device_flags()}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stdout + process.stderr
