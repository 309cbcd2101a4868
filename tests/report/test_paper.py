"""A printed value stands beside a measured one only if it is of the same experiment."""

import json

import pytest

from disco_jax import flags
from disco_jax.report import page, paper, rows
from disco_jax.train import experiment, teacher

MOCO, SWAV = "moco_v2_200ep_pretrain.pth.tar", "swav_800ep_pretrain.pth.tar"
IMAGES = rows.IMAGES["imagenet2012"]


def taught(recipe, weights=MOCO, by="moco_v2:student=resnet50", **changes):
    """Returns a config as a run stores it, with the network of its teacher."""
    config = flags.load(recipe)
    own = flags.load(by)
    config.teacher.update(teacher.shape(own.student), weights=weights)
    config.teacher.update(mean=tuple(own.augment.mean), std=tuple(own.augment.std))
    config.update_from_flattened_dict(changes)
    return json.loads(config.to_json_best_effort())


def measured(reference="linear:protocol=disco,student=resnet18", step=None, **changes):
    """Returns the results of an evaluation as its task stores them."""
    config = flags.changed(flags.load(reference), tuple(changes.items()), "test")
    return {"top1": 50.0, "step": step, "settings": json.loads(config.to_json_best_effort())}


def shown(config, result, data=None):
    """Returns the top-1 that a table shows; None if there is no value or it is grey."""
    value = paper.beside(config, result, data)
    return value.top1 if value and not value.differences else None


DISCO = "disco:student=resnet18,teacher=resnet50"


def test_the_papers_experiment_has_its_value():
    value = paper.beside(taught(DISCO), measured())
    assert (value.top1, value.top5, value.differences, value.assumed) == (60.6, 83.7, (), ())
    assert value.source == "DisCo (2104.09124), Table 1"


def test_where_and_how_a_run_computes_does_not_matter():
    changes = {
        "data.dir": "gs://bucket", "data.source": "folder", "seed": 3, "dtype": "bfloat16",
        "fast.shifts": "on", "log.every_steps": 7, "checkpoint.keep": 9, "name": "mine",
    }  # fmt: skip
    assert shown(taught(DISCO, **changes), measured()) == 60.6


def test_a_teacher_from_a_file_is_compared_by_its_network():
    """Files state sizes that configs leave to defaults."""
    stated = {"teacher.stem": "", "teacher.hidden": 2048, "teacher.width": 64, "teacher.layers": 2}
    assert shown(taught(DISCO, **stated), measured()) == 60.6
    assert shown(taught(DISCO, **{"teacher.width": 32}), measured()) is None


def test_a_smoke_run_with_a_random_teacher_has_no_value():
    config = experiment.resolve(flags.load("seed:student=resnet18,smoke=true"))
    assert config.teacher.weights == "random"
    config = json.loads(config.to_json_best_effort())
    assert paper.against(rows.find("seed/table1/resnet18/resnet50"), config, {}).differences
    assert paper.beside(config, measured("linear:protocol=seed,student=resnet18")) is None
    assert paper.unmeasured(config) == []


def test_cells_of_the_temperature_and_queue_sweeps_have_only_the_matching_value():
    probe = measured("linear:protocol=seed,student=resnet18")
    values = {
        t: shown(taught("seed", **{"objectives.similarity.teacher_temperature": t}), probe)
        for t in (0.0, 1e-3, 1e-2, 0.1)
    }
    assert values == {0.0: None, 1e-3: None, 1e-2: 57.6, 0.1: None}
    short = taught("seed", **{"objectives.similarity.queue_size": 256})
    assert shown(short, probe) is None


def test_teachers_of_swav_and_sela_have_the_values_of_table_6():
    by = dict(by="swav:student=resnet50")
    assert shown(taught(DISCO, SWAV, **by), measured()) == 65.1
    assert shown(taught(DISCO, "selav2_400ep_pretrain.pth.tar", **by), measured()) == 64.1
    either = paper.beside(taught(DISCO, "mine.pth", **by), measured())
    assert "SeLa-v2, 400 epochs, or SwAV" in either.differences[0]


def test_a_file_of_another_pretraining_has_no_value():
    config = taught(DISCO, "moco_v2_800ep_pretrain.pth.tar")
    (difference,) = paper.beside(config, measured()).differences
    assert difference == "teacher: moco_v2_800ep_pretrain.pth.tar, paper MoCo-v2, 200 epochs"


def test_what_a_file_cannot_prove_is_assumed():
    value = paper.beside(taught(DISCO, "mine.pth"), measured())
    assert value.top1 == 60.6 and value.assumed == ("a teacher by MoCo-v2, 200 epochs",)
    assert value.source.endswith("; assumed: a teacher by MoCo-v2, 200 epochs")


@pytest.mark.parametrize("epochs, top1", [(200, 60.6), (100, None)])
def test_a_teacher_that_is_a_run_proves_its_pretraining(epochs, top1, tmp_path):
    own = flags.load("moco_v2:student=resnet50")
    own.total_epochs = epochs
    (tmp_path / "config.json").write_text(own.to_json_best_effort())
    value = paper.beside(taught(DISCO, str(tmp_path)), measured())
    assert not value.assumed
    assert (None if value.differences else value.top1) == top1
    if epochs == 100:
        assert value.differences == ("teacher's total_epochs: 100, paper 200",)


@pytest.mark.parametrize("weights, text", [("random", "random weights"), ("", "no weights")])
def test_a_teacher_without_weights_has_no_value(weights, text):
    assert text in paper.beside(taught(DISCO, weights), measured()).differences[0]


DIFFERENT = {
    "epochs": (dict(total_epochs=100), {}, "total_epochs: 100, paper 200"),
    "width": ({"student.hidden": 1000}, {}, "student.hidden: 1000"),
    "probe": ({}, {"learning_rate.base_lr": 3.0}, "evaluation's learning_rate.base_lr: 3.0"),
    "cached": ({}, {"augment": "none"}, "evaluation's augment: 'none', paper 'linear'"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_value_of_another_experiment_is_grey_and_says_what_differs(name):
    changes, probe, text = DIFFERENT[name]
    value = paper.beside(taught(DISCO, **changes), measured(**probe))
    assert any(text in difference for difference in value.differences)
    top1, _, source = page.printed_cells(value)
    assert page.text(top1) == page.text(source) == ""
    html = page.table(("paper",), [[top1]])
    assert '<span class="grey" title="disco/table' in html and "60.60" in html
    assert page.html.escape(text, quote=True) in html


def test_other_data_and_many_differences_have_no_value():
    assert paper.beside(taught(DISCO, **{"data.name": "digits"}), measured()).differences
    folder = {"data.dir": "flowers/", "data.source": "folder"}
    assert paper.beside(taught(DISCO), measured(**folder)).differences
    changes = {"total_epochs": 2, "batch_size": 8, "views": 1, "augment.size": 32}
    assert paper.beside(taught(DISCO, **changes), measured()) is None
    assert paper.beside(taught(DISCO), {"top1": 50.0}) is None  # the protocol is not stored
    assert paper.beside({"data": {}, "evaluation": {}}, measured()) is None


def test_an_unfinished_run_and_other_images_have_no_value():
    config, steps = taught(DISCO), 200 * (IMAGES // 256)
    assert shown(config, measured(step=steps), {"records": IMAGES}) == 60.6
    assert shown(config, measured(step=steps - 1), {"records": IMAGES}) is None
    assert shown(config, measured(step=steps), {"pictures": 1000}) is None


def test_a_head_as_wide_as_the_features_is_disco_star():
    assert shown(taught(DISCO, **{"student.hidden": 512}), measured()) == 57.1
    assert shown(taught("disco_star:student=resnet18"), measured()) == 57.1


def test_few_labels_are_those_of_the_papers_list():
    drawn = measured("semi:protocol=disco,percent=10,student=resnet18")
    listed = measured("semi:protocol=disco,percent=10,student=resnet18,list=10percent.txt")
    assert shown(taught(DISCO), listed) == 50.1
    assert shown(taught(DISCO), drawn) is None


def test_evaluations_that_were_not_measured_are_listed_once():
    values = paper.unmeasured(taught(DISCO))
    printed = {value.row.evaluation.reference: value.top1 for value in values if value.top1}
    assert printed == {
        "linear:protocol=disco,student=resnet18": 60.6,
        "semi:protocol=disco,percent=1,student=resnet18": 39.2,
        "semi:protocol=disco,percent=10,student=resnet18": 50.1,
        "finetune:protocol=kd,student=resnet18": 60.6,
    }
