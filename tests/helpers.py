"""Helpers shared by several test modules."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

import reference_weights
from disco_jax import errors, flags, methods, models, typed
from disco_jax.evaluate.probe_settings import ProbeSettings
from disco_jax.methods.method_settings import TeacherSpec
from disco_jax.models.backbones.backbone import Backbone
from disco_jax.models.encoder import Encoded
from disco_jax.models.layers.norm import BatchNorm
from disco_jax.ops.collectives import AXIS
from disco_jax.run.checkpoint import Checkpoints
from disco_jax.run.workdir import claim
from disco_jax.train import experiment, state

PARITY = pathlib.Path(__file__).parent / "parity"


def fixture(name):
    """Returns (description, arrays) of a recorded case."""
    return reference_weights.load(str(PARITY), name)


@functools.cache
def recorded_state(name):
    """Returns (description, arrays, full official state dict) of a recorded network."""
    meta, arrays = fixture(f"models/{name}")
    weights = meta["weights"]
    state = reference_weights.make_state_dict(
        meta["manifest"], weights["salt"], weights["conv_gain"]
    )
    return meta, arrays, state


def recorded_images(case):
    """Returns the NHWC images of a recorded case of a network."""
    spec = case["inputs"][0]
    images = reference_weights.make_input(spec["seed"], spec["n"], spec["height"], spec["width"])
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def encoder_spec(backbone, **fields):
    """Returns the description of a network."""
    return models.NetworkSpec(**{"backbone": backbone, "hidden": -1, **fields})


def teacher_spec(backbone, **fields):
    """Returns the description of a teacher, by default with a head."""
    return TeacherSpec(**{"backbone": backbone, "hidden": -1, "head": "mlp", **fields})


def build_method(config, views=2, local_views=0):
    """Builds the method of a pretraining config, for the given numbers of views."""
    settings = experiment.parse(config).method
    return methods.build(dataclasses.replace(settings, views=views, local_views=local_views))


def relative_error(actual, reference):
    """Returns the largest absolute difference divided by the largest absolute reference value."""
    reference = np.asarray(reference, np.float64)
    return np.max(np.abs(np.asarray(actual, np.float64) - reference)) / np.max(np.abs(reference))


@functools.lru_cache(1)
def _mapped(function):
    """Returns a compiled function of replicas; calls in a loop share its program."""
    return jax.jit(jax.vmap(function, axis_name=AXIS))


def single(function, *args):
    """Calls a function that uses collectives, compiled, with a single replica."""
    add = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
    out = _mapped(function)(*add)
    return jax.tree.map(lambda x: x[0], out)


class TinyEncoder(nn.Module):
    """Linear - BatchNorm - ReLU - Linear on vectors, or one Linear: the fixtures' encoders."""

    hidden: int
    dim: int

    @nn.compact
    def __call__(self, images, *, norm):
        x = images
        if self.hidden:
            x = nn.Dense(self.hidden, name="l1")(x)
            x = nn.relu(BatchNorm(name="bn")(x, norm=norm))
        return Encoded(x, nn.Dense(self.dim, name="fc")(x))


_NUMBERS = {
    "stage_sizes", "depths", "width", "repeats", "nominal", "heads", "depth", "patch", "grid",
    "layer_scale",
}  # fmt: skip


def _kind(name):
    """Returns the class of a backbone and its fields, except widths, depths and sizes."""
    cls, fields = models.BACKBONES[name]
    return cls, str({field: value for field, value in fields.items() if field not in _NUMBERS})


# The first backbone of each kind; the others differ only in numbers.
KINDS = list({_kind(name): name for name in reversed(models.BACKBONES)}.values())


class TinyBackbone(Backbone):
    """Four mean colours - Linear - BatchNorm - tanh: compiles quickly and produces no ties."""

    width: int = 4
    stem: str = "small"

    @property
    def out_features(self):
        return self.width

    @nn.compact
    def __call__(self, images, *, norm):
        odd = images.shape[1] % 2
        images = jnp.pad(images, ((0, 0), (0, odd), (0, odd), (0, 0)))
        n, side = len(images), images.shape[1] // 2
        x = images.reshape(n, 2, side, 2, side, 3).mean((2, 4)).reshape(n, -1)
        x = nn.Dense(self.width, use_bias=False, dtype=self.compute.dtype)(x)
        compute = self.compute
        batch_norm = BatchNorm(group=compute.norm_group, sync_groups=compute.sync_groups)
        x = jnp.tanh(batch_norm(x, norm=norm))
        return x.astype(jnp.float32)


@contextlib.contextmanager
def tiny_backbone():
    """Registers `TinyBackbone` as the backbone "tiny" inside the context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "tiny", (TinyBackbone, {}))
        yield


# One or two instances of each building block, as narrow as possible.
_CUT = {
    "resnet": dict(stage_sizes=(1, 1), width=8),
    "efficientnet": dict(repeats=(1, 2, 1, 0, 0, 0, 0)),
    "vit": dict(width=24, heads=3, patch=4, depth=2, grid=4),
    "xcit": dict(width=32, heads=2, patch=8, depth=1, class_blocks=1),
}


def cut_backbone(name, **fields):
    """Builds a shallow, narrow variant of a backbone that has all of its building blocks."""
    family, variant = models.BACKBONES[name]
    if "stages" in variant:  # MobileNets; the first block of the sixth stage has every feature
        stages = variant["stages"]
        cut = dict(stages=(stages[0], stages[1][:2], stages[5][:1]))
    else:
        cut = next(cut for prefix, cut in _CUT.items() if prefix in name)
    return family(**{**variant, **cut, **fields})


def tiny_variables(arrays, prefix):
    """Converts a recorded PyTorch state to the variables of a `TinyEncoder`."""
    params, stats = {}, {}
    for key, value in arrays.items():
        if not key.startswith(prefix):
            continue
        *module, leaf = key.removeprefix(prefix).split(".")
        name = module[0] if module else "fc"
        if leaf == "num_batches_tracked":
            continue
        if leaf.startswith("running"):
            stats.setdefault(name, {})[leaf.removeprefix("running_")] = value
        elif leaf == "bias":
            params.setdefault(name, {})["bias"] = value
        elif name == "bn":
            params.setdefault(name, {})["scale"] = value
        else:
            params.setdefault(name, {})["kernel"] = value.T
    return {"params": params, "batch_stats": stats}


class Identity:
    """A view recipe without photometric operations."""

    def photometric(self, views, key, positions):
        return views


# Arguments that change a recipe's views or objectives: recipe -> arguments, tested besides the
# recipe itself.
VARIANTS = {
    "seed": ("views=cross", "views=small_patch", "moco=true"),
    "retro": ("symmetric=false",),
    "disco_seed": ("rkd=true",),
    "compress": ("queues=1",),
    "sslight_moco": ("views=two",),
}
# All pretraining recipes, those with views of two sizes, and all with their variants.
PRETRAINING = tuple(name for name in flags.recipes() if "objectives" in flags.load(name))
MULTICROP = tuple(name for name in PRETRAINING if flags.load(name).local.count)
RECIPES = tuple(
    recipe
    for name in PRETRAINING
    for recipe in (name, *(f"{name}:{arguments}" for arguments in VARIANTS.get(name, ())))
)


@functools.cache
def has_teacher(recipe):
    """Returns True if a recipe takes the argument `teacher`."""
    try:
        flags.load(f"{recipe.partition(':')[0]}:teacher=resnet8")
    except errors.UserError:
        return False
    return True


QUIET = {}  # changes applied to every smoke config


@contextlib.contextmanager
def tiny_networks():
    """Makes all smoke configs use `TinyBackbone` inside the context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "tiny", (TinyBackbone, {}))
        for network in ("student", "teacher"):
            patch.setitem(QUIET, f"{network}.backbone", "tiny")
        yield


@contextlib.contextmanager
def programs_kept(folder):
    """Enables the compilation cache in `folder` inside the context, as the command line does."""

    def update(**fields):
        for name, value in fields.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()  # JAX may have opened the previous folder

    changes = {
        "enable_compilation_cache": True,
        "compilation_cache_dir": str(folder),
        "persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, f"jax_{name}") for name in changes}
    update(**changes)
    try:
        yield
    finally:
        update(**before)


def smoke_config(recipe, **changes):
    """Returns the config of a shipped recipe, shrunk so that its step compiles in seconds."""
    name, _, extra = recipe.partition(":")
    arg = "student=resnet8,smoke=true,data=digits"
    if has_teacher(name):
        arg += ",teacher=resnet8"
    config = flags.load(f"{name}:{arg}" + (f",{extra}" if extra else ""))
    config.augment.size, config.local.size = 16, 8
    config.student.width = config.teacher.width = 4
    if config.bags.sampling == "clusters" or config.objectives.bags.weight:
        config.bags.file = "bags.npz"  # not read before a run starts
    config.log.report = False  # reports are tested in tests/report
    config.update_from_flattened_dict({**QUIET, **changes})
    return experiment.resolve(config)


def smoke_settings(recipe, **changes):
    """Returns the typed settings of a `smoke_config`."""
    return experiment.parse(smoke_config(recipe, **changes))


def probe_settings(config):
    """Returns the typed settings of a config of a training with labels."""
    return typed.parse(ProbeSettings, config, defaults=True)


def tiny_config(recipe, **changes):
    """Returns a `smoke_config` with `tiny_backbone`, whose step compiles in a few seconds."""
    changes = {"student.backbone": "tiny", **changes}
    if has_teacher(recipe):
        changes["teacher.backbone"] = "tiny"
    return only_cropped(smoke_config(recipe, **changes))


def only_cropped(config):
    """Disables photometric augmentation, which is half of the work of compiling a tiny step."""
    for part in (config.augment, config.local):
        with part.ignore_type():  # some recipes have a tuple with a number per view
            part.update({name: 0.0 for name in part if name.endswith("_prob")})
    return config


def only_flipped(config):
    """Disables photometric augmentation except flips, which show whether draws are the same."""
    only_cropped(config).augment.flip_prob = 0.5
    return config


def compile_once(monkeypatch):
    """Lets all later runs reuse the first run's `Prepared`, and so its compiled step."""
    from disco_jax.workflows import pretrain

    cache, prepare = [], pretrain.prepare

    def prepare_once(*args):
        if not cache:
            cache.append(prepare(*args))
        return cache[0]

    monkeypatch.setattr(pretrain, "prepare", prepare_once)
    monkeypatch.setattr(pretrain.step, "parallel", functools.cache(pretrain.step.parallel))


def network_run(folder, data_file, recipe="moco_v2", seed=0, **changes):
    """Creates a run directory with an untrained student, on the images of an .npz file."""
    config = smoke_config(recipe, **changes)
    config.data.source, config.data.dir, config.seed = "npz", str(data_file), seed
    encoder = models.build_encoder(experiment.parse(config).student)
    student = encoder.create(seed, config.augment.size)
    initial = state.TrainState(np.int32(0), student, {}, {}, ())
    with claim(str(folder), config), contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(0, initial, [[0, 0]], {})
        checkpoints.wait()
    return str(folder)


def smoke(config, replicas):
    """Returns (single-replica step, state, frozen, batch with a leading replica axis)."""
    config = ConfigDict({**config.to_dict(), "total_epochs": 5})
    assembled = experiment.assemble(config, steps_per_epoch=10)
    built = assembled.build_step()
    frozen = {}
    if "teacher" in assembled.needs:
        encoder = assembled.method.networks["teacher"].encoder
        frozen["teacher"] = encoder.create(1, config.augment.size)
    train_state = assembled.initial_state(built, teacher=frozen.get("teacher"))
    rng = np.random.default_rng(0)
    shapes = assembled.batch_shapes(replicas)
    crops = {v: rng.integers(0, 256, x.shape, np.uint8) for v, x in shapes["views"].items()}
    aux = {name: rng.integers(0, 16, x.shape, np.int32) for name, x in shapes["aux"].items()}
    return built.train_step, train_state, frozen, {"views": crops, "aux": aux}


@functools.cache
def digits():
    """Returns scikit-learn's digits as the arrays of an .npz file: 1437 train, 360 test images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    loaded = load_digits()
    images = np.round(loaded.images * (255 / 16)).astype(np.uint8)
    rows = train_test_split(
        np.arange(len(images)), test_size=360, random_state=0, stratify=loaded.target
    )
    arrays = {}
    for split, chosen in zip(("train", "test"), rows, strict=True):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], loaded.target[chosen]
    return arrays


def digits_splits():
    """Returns the digits in the form that `ArraySource` takes."""
    arrays = digits()
    return {s: (arrays[f"{s}_images"], arrays[f"{s}_labels"]) for s in ("train", "test")}


def crop(size=8, **changes):
    """Returns the config of a crop."""
    fields = dict(
        size=size,
        scale=(0.2, 1.0),
        ratio=(3 / 4, 4 / 3),
        interpolation="bilinear",
        antialias="exact",
    )
    return types.SimpleNamespace(**{**fields, **changes})


def same_batches(actual, expected):
    """Asserts that two lists of host batches are equal."""
    assert [b.position for b in actual] == [b.position for b in expected]
    for a, b in zip(actual, expected, strict=True):
        assert a.views.keys() == b.views.keys()
        for view in a.views:
            np.testing.assert_array_equal(a.views[view], b.views[view])
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.rows, b.rows)


def one_device_flags():
    """Returns XLA_FLAGS that give a child process one device."""
    words = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(w for w in words if "device_count" not in w)


def flags_config(words):
    """Returns the config of the command line `disco-jax WORDS`."""
    return flags.parse(words[0], words[1:], help_line="").config


def restore(folder, like):
    """Restores the newest checkpoint of a run directory."""
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        return checkpoints.restore(like)


@contextlib.contextmanager
def devices(count):
    """Makes JAX report only the first `count` devices inside the context."""
    some = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: some)
        patch.setattr(jax, "local_devices", lambda *_, **__: some)
        patch.setattr(jax, "device_count", lambda *_: count)
        patch.setattr(jax, "local_device_count", lambda *_: count)
        yield
