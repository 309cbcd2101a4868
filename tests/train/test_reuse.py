"""Reused heads, feature maps, normalisation of each network, and checks of invalid settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import models
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.models.encoder import Network, encode, rescaling
from disco_jax.ops.collectives import AXIS
from disco_jax.train import experiment, session, state, teacher
from disco_jax.train.experiment import parse
from disco_jax.train.state import replicate
from disco_jax.workflows import pretrain


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with helpers.tiny_backbone():
        yield


def steps(config, count=2):
    """Takes steps on one device; returns (first state, last state, frozen, metrics)."""
    step, first, frozen, batch = helpers.smoke(config, 1)
    devices = jax.devices()[:1]
    run = jax.pmap(step, AXIS, in_axes=(None, None, 0), out_axes=None, devices=devices)
    last, replicated = replicate(first, devices), replicate(frozen, devices)
    for _ in range(count):
        last, metrics = run(last, replicated, batch)
    return jax.device_get((first, last, frozen, metrics))


@pytest.mark.wiring  # shows which arrays move
def test_retro_learns_backbone_and_adapter_and_leaves_the_teachers_head_alone():
    first, last, frozen, _ = steps(helpers.tiny_config("retro"))
    head = frozen["teacher"]["params"]["head"]
    for network in (first.student, last.student, last.momentum):
        jax.tree.map(np.testing.assert_array_equal, network["params"]["head"], head)
    for part in ("backbone", "adapter"):
        moved = jax.tree.map(
            lambda a, b: not np.array_equal(a, b), first.student["params"], last.student["params"]
        )[part]
        assert any(jax.tree.leaves(moved)), part
    # The optimizer's state does not contain the head, only a momentum buffer per trained array.
    learned = {part: last.student["params"][part] for part in ("backbone", "adapter")}
    buffers = [x.shape for x in jax.tree.leaves(last.opt_state) if np.ndim(x)]
    assert sorted(buffers) == sorted(x.shape for x in jax.tree.leaves(learned))


@pytest.mark.wiring  # shows which statistics move
def test_batchnorm_in_a_reused_head_keeps_the_teachers_mode():
    """Covers disagreement R2, with a head like SwAV's."""
    changes = {"teacher.head": "swav", "teacher.norm": "running"}
    config = helpers.tiny_config("retro", **changes)
    method = helpers.build_method(config, config.views)
    assert [method.networks[n].encoder.head_norm for n in ("student", "momentum")] == [
        "running"
    ] * 2
    assert method.networks["teacher"].norm == "running"
    first, last, _, _ = steps(config)
    before, after = (s.student["batch_stats"] for s in (first, last))
    jax.tree.map(np.testing.assert_array_equal, before["head"], after["head"])
    before, after = (stats["backbone"]["BatchNorm_0"]["mean"] for stats in (before, after))
    assert not np.array_equal(before, after)
    local = helpers.build_method(helpers.tiny_config("retro", **{"teacher.head": "swav"}), 2)
    assert local.networks["student"].encoder.head_norm == ""


def test_retros_student_is_described_whole_and_learns_what_table_5_counts():
    """The resolved config describes the student completely, so it builds without the teacher."""
    config = helpers.smoke_config("retro", **{"teacher.head": "mlp", "student.dim": 7})
    assert (config.student.head, config.student.dim) == ("mlp", 16)
    assert config.student.adapter == models.width(parse(config).teacher) == 16
    _, train_state, _, _ = helpers.smoke(config, 1)
    encoder = models.build_encoder(parse(config).student)
    shapes = jax.tree.map(jnp.shape, train_state.student)
    assert shapes == jax.tree.map(jnp.shape, dict(encoder.create(0, 16)))
    method = helpers.build_method(config, config.views)
    learned, frozen = method.split(train_state.student["params"])
    count = models.parameters(encoder, ("backbone", "adapter"))
    assert sum(x.size for x in jax.tree.leaves(learned)) == count and set(frozen) == {"head"}


def convolutions(recipe):
    """Counts the convolutions in a recipe's compiled step.

    `fast.shifts` is off because shifted maps are not convolutions to the compiler. LLVM's
    optimisations are off to save time, since XLA removes unused operations before them.
    """
    config = helpers.only_cropped(helpers.smoke_config(recipe, **{"fast.shifts": "off"}))
    step, train_state, frozen, batch = helpers.smoke(config, 1)
    mapped = jax.vmap(step, in_axes=(None, None, 0), axis_name=AXIS)
    compiled = (
        jax.jit(mapped)
        .lower(train_state, frozen, batch)
        .compile(compiler_options={"xla_backend_optimization_level": 0})
    )
    return compiled.as_text().count(" convolution(")


@pytest.mark.wiring  # counts operations
def test_the_compiled_steps_hold_no_network_that_nobody_reads():
    """A ResNet-8 has 9 convolutions; its backward pass has twice as many, minus the image's."""
    forward, backward = 9, 17
    assert convolutions("seed") == 2 * forward + backward  # student, teacher
    assert convolutions("moco_v2") == 2 * forward + backward  # student, momentum


def test_maps_are_kept_only_where_they_are_read():
    config = helpers.smoke_config("attention")
    method = helpers.build_method(config, config.views)
    assert method.reads_maps("student") and method.reads_maps("teacher")
    assert not method.reads_maps("momentum")
    record = state.shapes(method, (16, 16))
    sizes = [x.shape[1] for x in record.encoded["teacher"][0].maps]
    assert sizes == [16, 8, 4] and record.encoded["momentum"][1].maps is None


@pytest.mark.parametrize(
    "backbone, sizes",
    [("resnet18", [56, 28, 14, 7]), ("resnet50", [56, 28, 14, 7]),
     ("efficientnet_b0", [112, 56, 28, 14, 7]), ("mobilenetv3_large", [112, 56, 28, 14, 7]),
     ("mobilenetv2", [112, 56, 28, 14, 7])],
)  # fmt: skip
def test_the_students_of_the_papers_have_every_map_of_a_resnet_50(backbone, sizes):
    network = Network(models.backbone(backbone))
    shape = state._output_shape(network, True, 224)
    assert [x.shape[1] for x in shape.maps] == sizes


@pytest.mark.wiring  # compares a sum with its terms
def test_maps_of_other_sizes_need_a_resize_rule():
    """Checks too that with `resize` the loss of a step sums over all sizes."""
    changes = {"student.stem": "imagenet", "augment.size": 32, "fast.shifts": "off"}
    config = helpers.smoke_config("attention", **changes)
    method = helpers.build_method(config, config.views)
    with pytest.raises(
        UserError, match=r"teacher has a map of 32x32, the student has maps of 8x8.*linear"
    ):
        method.check(state.shapes(method, (32, 32)))
    config.objectives.attention.resize = "linear"
    _, _, _, metrics = steps(helpers.only_cropped(config), 1)
    assert np.isfinite(metrics["loss"])
    each = [value for name, value in metrics.items() if name.startswith("attention/size_")]
    assert len(each) == 3
    assert metrics["attention/loss"] == pytest.approx(sum(each), rel=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"student.backbone": "vit_tiny_p16", "student.stem": "", "student.width": 0,
          "augment.size": 32, "objectives.attention.resize": "linear"}, "has no feature maps"),
        ({"objectives.attention.layers": "lst"}, "Did you mean 'last'"),
        ({"objectives.attention.resize": "liner"}, "Did you mean 'linear'"),
    ],
)  # fmt: skip
def test_attention_that_cannot_be_is_refused_with_nothing_written(changes, message, tmp_path):
    config = helpers.smoke_config("attention", **changes)
    with pytest.raises(UserError, match=message):
        pretrain.run(config, str(tmp_path / "run"), ArraySource(helpers.digits_splits()))
    assert not (tmp_path / "run").exists()


MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def test_a_network_sees_the_normalisation_that_it_was_trained_with():
    encoder = models.build_encoder(helpers.encoder_spec("resnet8", width=4, hidden=8, dim=8))
    variables = encoder.create(0, 16)
    image = jnp.asarray(np.random.default_rng(0).random((4, 16, 16, 3), np.float32))
    imagenet = tuple(map(jnp.asarray, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))))
    network = Network(encoder, "running", rescaling((MEAN, STD), tuple(map(tuple, imagenet))))

    def embed(network, mean, std):
        x = (image - jnp.asarray(mean)[None, None, None]) / jnp.asarray(std)[None, None, None]
        return encode(network, variables, {0: x}, (0,), jax.random.key(0))[0][0].embedding

    rescaled, expected = embed(network, *imagenet), embed(Network(encoder, "running"), MEAN, STD)
    np.testing.assert_allclose(rescaled, expected, atol=1e-5)
    assert not np.allclose(embed(Network(encoder, "running"), *imagenet), expected, atol=1e-3)
    assert rescaling((MEAN, STD), (MEAN, STD)) is None


@pytest.mark.wiring  # compares settings
def test_a_teachers_normalisation_comes_with_its_weights(tmp_path):
    """A student with another normalisation rescales the images for the teacher of a run."""
    source = ArraySource(helpers.digits_splits())
    run = helpers.tiny_config("moco_v2", batch_size=16, total_steps=1)
    run.augment.update(mean=MEAN, std=STD)
    pretrain.run(run, str(tmp_path / "teacher"), source)
    config = helpers.tiny_config("simreg", batch_size=16)
    config.teacher.update(head="auto", weights=str(tmp_path / "teacher"))
    ready = pretrain.prepare(config, source)
    assert (ready.settings.teacher.mean, ready.settings.teacher.std) == (MEAN, STD)
    student = tuple(config.augment.mean), tuple(config.augment.std)
    assert ready.method.networks["teacher"].rescale == rescaling((MEAN, STD), student)
    assert ready.method.networks["student"].rescale is None
    assert teacher.normalisation(str(tmp_path / "teacher")) == (MEAN, STD)
    config.teacher.update(mean=student[0], std=student[1])  # as in the official code
    assert pretrain.prepare(config, source).method.networks["teacher"].rescale is None


@pytest.mark.parametrize(
    "recipe, changes, message",
    [
        ("retro", {"teacher.head": "none"}, "the teacher has no head"),
        ("retro", {"student.reuse": ("heads",)}, "Did you mean 'head'"),
        ("moco_v2", {"student.reuse": ("head",)}, "no objective has a teacher"),
        ("bingo", {"bags.file": ""}, "Compute them with `disco-jax bags`"),
        ("bingo", {"local.count": 2}, r"multi-crop.*local\.count=2.*cutmix=False"),
        ("bingo", {"views": 5}, r"config\.views=4"),
        ("bingo", {"views": 3}, "reads view 3 of the teacher"),
        ("compress:queues=1", {"student.dim": 5}, "must equal the 16 features of the teacher"),
        ("compress:queues=1", {"student.head": "none", "teacher.width": 8}, "Set --config.student"),
        ("compress", {"objectives.compress.queue_size": 4}, "below config.batch_size"),
        ("simreg", {"objectives.distill.teacher_output": "feature"}, "Did you mean 'features'"),
        ("seed", {"teacher.mean": (0.5,)}, "three numbers each"),
        ("ressl", {"objectives.consistency.target_temperature": 0.0}, "must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_compiled(recipe, changes, message):
    with pytest.raises(UserError, match=message):
        config = helpers.smoke_config(recipe, **changes)
        helpers.build_method(config, config.views, config.local.count)


@pytest.mark.parametrize(
    "recipe, changes, message",
    [
        ("pseudo_labels", {"student.prototypes": ()}, "there are none"),
        ("compress", {"objectives.compress.bank": "momentun"}, "Did you mean 'momentum'"),
    ],
)
def test_what_shapes_tell_is_refused_before_anything_is_compiled(recipe, changes, message):
    with pytest.raises(UserError, match=message):
        config = helpers.smoke_config(recipe, **changes)
        method = helpers.build_method(config, config.views, config.local.count)
        method.check(state.shapes(method, (16,)))


def test_a_group_of_relations_must_divide_a_devices_batch():
    config = helpers.smoke_config("rkd", **{"objectives.relations.group": 32})
    with pytest.raises(UserError, match=r"relations\.group=32 does not divide the 2 images"):
        pretrain.prepare(config, ArraySource(helpers.digits_splits()))


@pytest.mark.parametrize("recipe, says", [("retro", "6 forward passes"), ("disco", "5 forward")])
def test_the_plan_is_printed(recipe, says, capsys):
    config = helpers.smoke_config(recipe)
    ready = pretrain.prepare(config, ArraySource(helpers.digits_splits()))
    begin = ready.experiment.initial_state(ready.built, teacher=ready.teacher.variables)
    session.describe(ready, begin)
    out = capsys.readouterr().out
    assert says in out and ("M of it trainable" in out) == (recipe == "retro")


def test_a_one_hot_teacher_is_a_setting_of_seed_alone():
    config = helpers.smoke_config("seed", **{"objectives.similarity.teacher_temperature": 0.0})
    assert helpers.build_method(config, 1).objectives["similarity"].teacher_temperature == 0
    config.objectives.similarity.student_temperature = 0.0
    with pytest.raises(UserError, match=r"student_temperature must be above 0"):
        helpers.build_method(config, 1)


def test_objectives_that_count_epochs_learn_how_long_one_is():
    bags = helpers.build_method(helpers.smoke_config("bingo"), 4).with_epoch_length(179)
    assert bags.objectives["bags"].steps_per_epoch == 179


def test_ressls_key_is_only_cropped_and_flipped():
    config = helpers.smoke_config("ressl")
    query, key = experiment.assemble(config).views.photometric_ops
    assert set(query.active) - {"flip"} == {"jitter", "grey", "blur"}
    assert set(key.active) <= {"flip"}


@pytest.mark.parametrize(
    "recipe, message",
    [("seed:views=crossed", "Did you mean 'cross'"), ("compress:queues=3", "Allowed: 1, 2")],
)
def test_mistaken_arguments_of_recipes(recipe, message):
    with pytest.raises(UserError, match=message):
        helpers.smoke_config(recipe)
