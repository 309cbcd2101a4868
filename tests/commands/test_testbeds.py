"""Tests of SwAV and DINO runs as teachers for DisCo on the same testbed, end to end."""

import jax
import numpy as np
import pytest

import helpers
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.evaluate import features
from disco_jax.train import step
from disco_jax.train.experiment import assemble
from disco_jax.workflows import pretrain

# Checks which network and output of a run is the teacher, by comparing two paths of this package.
pytestmark = pytest.mark.wiring


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with helpers.tiny_networks():
        yield


@pytest.fixture(scope="module")
def source():
    return ArraySource(helpers.digits_splits())


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory):
    """Directories of a short SwAV and a short DINO run."""
    root = tmp_path_factory.mktemp("teachers")
    for recipe in ("swav", "dino"):
        pretrain.run(cropped(recipe), str(root / recipe), source)
    return root


def cropped(recipe, **changes):
    return helpers.only_cropped(helpers.smoke_config(recipe, **changes))


def student_of(run, recipe, **changes):
    config = cropped(recipe, **{"teacher.weights": str(run), **changes})
    config.teacher.head = "auto"
    return config


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, dict(tree), dict(other))


def test_a_swav_run_teaches_with_its_raw_embedding(runs, source, tmp_path, capsys):
    """Checks disagreement W1: the teacher's embedding is not normalised unless requested."""
    config = student_of(runs / "swav", "swav_disco")
    ready = pretrain.prepare(config, source)
    assert ready.settings.teacher.head == "swav" and ready.settings.teacher.prototypes == (16,)
    encoder = ready.method.networks["teacher"].encoder
    trained = features.load(str(runs / "swav"))
    assert_same(ready.teacher.variables, trained.variables)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype("f")
    raw = encoder.apply(ready.teacher.variables, images, norm="running").embedding
    scaled = trained.encoder.apply(trained.variables, images, norm="running").embedding
    lengths = np.linalg.norm(raw, axis=-1, keepdims=True)
    assert np.abs(lengths - 1).max() > 1e-2
    np.testing.assert_allclose(raw / lengths, scaled, atol=1e-5)
    config.objectives.distill.teacher_unit = True
    assert pretrain.prepare(config, source).method.networks["teacher"].encoder.normalised()

    config.objectives.distill.teacher_unit = False
    assert pretrain.run(config, str(tmp_path / "run"), source)["step"] == 2
    out = capsys.readouterr().out
    assert "views: 2 global of 16 px from 0.5 to 1 of the area, 2 local of 8 px" in out
    assert "mean pixel scale of global views divided by that of local views: 3." in out


def test_of_a_dino_run_the_ema_copy_teaches(runs, source):
    config = student_of(runs / "dino", "dino_disco")
    ready = pretrain.prepare(config, source)
    momentum = features.load(str(runs / "dino"), "momentum").variables
    student = features.load(str(runs / "dino")).variables
    assert_same(ready.teacher.variables, momentum)
    config.teacher.network = "student"
    assert_same(pretrain.prepare(config, source).teacher.variables, student)
    assert any(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(momentum), jax.tree.leaves(student), strict=True)
    )
    config.teacher.network = "momentun"
    with pytest.raises(UserError, match="Did you mean 'momentum'"):
        pretrain.prepare(config, source)


def test_a_run_without_an_ema_copy_teaches_with_its_student(runs, source, caplog):
    """Falls back to the student, as for an import, which has one network."""
    config = student_of(runs / "swav", "swav_disco", **{"teacher.network": "momentum"})
    ready = pretrain.prepare(config, source)
    assert_same(ready.teacher.variables, features.load(str(runs / "swav")).variables)
    assert "has no momentum network" in caplog.text


def test_a_swav_teacher_serves_the_moco_testbed_too(runs, source):
    ready = pretrain.prepare(student_of(runs / "swav", "disco"), source)
    assert ready.settings.teacher.head == "swav" and ready.teacher.queue is None


@pytest.mark.parametrize(
    "recipe, student, network",
    [
        ("sslight_moco", "disco", "student"),
        ("sslight_swav", "swav_disco", "student"),
        ("sslight_dino", "dino_disco", "momentum"),
    ],
)
def test_a_run_with_sslights_views_teaches_and_compiles_one_step(
    recipe, student, network, source, tmp_path, monkeypatch
):
    traced, parallel = [], step.parallel

    def count(train_step):
        def counted(*args):
            traced.append(recipe)
            return train_step(*args)

        return parallel(counted)

    monkeypatch.setattr(step, "parallel", count)
    pretrain.run(cropped(recipe, total_steps=3), str(tmp_path), source)
    assert len(traced) == 1  # one step for both sizes of views
    ready = pretrain.prepare(student_of(tmp_path, student), source)
    assert_same(ready.teacher.variables, features.load(str(tmp_path), network).variables)


@pytest.mark.parametrize(
    "recipe, changes, message",
    [
        ("swav", {"student.prototypes": ()}, r"config\.student\.prototypes=\(\)\. Set for example"),
        ("dino", {"student.prototypes": (4, 4)}, r"reads the scores of one set of prototypes"),
        ("dino", {"momentum.follow": "afer"}, "Did you mean 'after'"),
        (
            "dino",
            {"momentum.ema_rate_end": 1.5},
            r"ema_rate_end=1\.5 must be a finite number",
        ),
        ("dino", {"optimizer.frozen": ("head/scale",)}, "'head/scale' matches no parameter"),
        ("swav", {"objectives.swapped.queue_size": 12}, "nearest that are: 8, 16"),
        (
            "swav",
            {"objectives.swapped.epsilon": 0.0},
            r"epsilon=0\.0 must be a finite number above 0",
        ),
        (
            "swav",
            {"objectives.swapped.global_share": 1.2},
            r"share=1\.2 must be a finite number from -1 to 1",
        ),
        ("swav", {"objectives.swapped.assign": (0, 9)}, "reads view 9 of the student"),
        ("sslight_moco", {"objectives.contrast.local_queries": False}, "makes view 2, which no"),
        ("dino", {"student.drop_path": 0.1}, r"drop_path=0\.1: tiny has no such option"),
    ],
)
def test_mistakes(recipe, changes, message, source):
    with pytest.raises(UserError, match=message):
        pretrain.prepare(helpers.smoke_config(recipe, **changes), source)


def test_transformers_and_their_teachers_are_built_for_the_papers_and_for_small_images():
    from disco_jax import flags

    for student, teacher in (
        ("vit_tiny_p16", "vit_small_p16"),
        ("xcit_tiny_12_p16", "xcit_small_12_p16"),
    ):
        for data in ("imagenet2012", "fashion_mnist"):
            config = flags.load(f"dino_disco:student={student},teacher={teacher},data={data}")
            assert config.optimizer.name == "adamw" and config.student.head == "dino"
            config.teacher.update(head="dino", prototypes=config.student.prototypes)
            method = assemble(config).method
            for name in ("student", "teacher"):
                encoder = method.networks[name].encoder
                encoder = encoder.clone(backbone=encoder.backbone.clone(depth=1))
                sizes = (config.augment.size, config.local.size)
                images = [jax.ShapeDtypeStruct((1, s, s, 3), np.float32) for s in sizes]
                out = jax.eval_shape(
                    lambda x, y, e=encoder: e.init(
                        jax.random.key(0), [x, y], norm="running", method="together"
                    ),
                    *images,
                )
                assert out["params"]["head"]["out"]["kernel"].shape[1] == config.student.dim


@pytest.mark.parametrize("data", ["imagenet2012", "fashion_mnist", "digits"])
@pytest.mark.parametrize("recipe", helpers.MULTICROP)
def test_recipes_hold_together_for_every_data_set(recipe, data):
    """Checks that all views are read, and the papers' batch and crop sizes."""
    from disco_jax import flags

    config = flags.load(f"{recipe}:data={data}")
    config.teacher.update(head="mlp", dim=config.student.dim)  # normally set from the weights
    experiment = assemble(config)
    sizes, method = experiment.views.sizes, experiment.method
    read = {view for network_views in experiment.needs.values() for view in network_views}
    assert read == set(range(len(sizes)))
    assert len(set(sizes)) == 2 and all(net.grouped for net in method.networks.values())
    assert {net.norm for name, net in method.networks.items() if name != "teacher"} == {"sync"}
    large = data == "imagenet2012"
    assert sizes[0] == (224 if large else {"fashion_mnist": 28, "digits": 16}[data])
    if large:
        papers = {"swav": 512, "swav_disco": 512, "dino": 512, "dino_disco": 512}
        assert config.batch_size == papers.get(recipe, 1024)
        assert config.local.size == (128 if recipe.startswith("sslight") else 96)


def test_sslights_axes_are_the_papers():
    from disco_jax import flags

    for student, locals_ in (("mobilenetv2", 6), ("vit_tiny_p16", 10)):
        config = flags.load(f"sslight_dino:student={student}")
        assert config.augment.scale == (0.3, 1.0) and config.local.scale == (0.05, 0.3)
        assert (config.augment.size, config.local.size) == (224, 128)
        assert (config.views, config.local.count) == (2, locals_)
        assert config.objectives.self_distill.global_share == 0.4
    assert flags.load("sslight_moco").objectives.contrast.global_share == 0.4
    assert flags.load("sslight_swav").objectives.swapped.global_share == 0.4
