"""What several tests need."""

import contextlib
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
from disco_jax import flags, methods, models
from disco_jax.data import views
from disco_jax.models.encoder import Encoded
from disco_jax.models.norm import BatchNorm
from disco_jax.ops.collectives import AXIS
from disco_jax.train import state, teacher
from disco_jax.train.checkpoint import Checkpoints
from disco_jax.train.step import from_config
from disco_jax.train.workdir import claim

PARITY = pathlib.Path(__file__).parent / "parity"


def fixture(name):
    """(description, arrays) of a recorded case."""
    return reference_weights.load(str(PARITY), name)


@functools.cache
def recorded_state(name):
    """(description, arrays, state dict) of a recorded network: the whole official checkpoint."""
    meta, arrays = fixture(f"models/{name}")
    weights = meta["weights"]
    state = reference_weights.make_state_dict(
        meta["manifest"], weights["salt"], weights["conv_gain"]
    )
    return meta, arrays, state


def recorded_images(case):
    """NHWC images of a recorded case of a network."""
    spec = case["inputs"][0]
    made = reference_weights.make_input(spec["seed"], spec["n"], spec["height"], spec["width"])
    return jnp.asarray(made.transpose(0, 2, 3, 1))


def encoder_spec(backbone, **fields):
    """A network's part of a config."""
    spec = dict(
        width=0,
        stem="",
        grid=0,
        patch=0,
        drop_path=0.0,
        zero_init_residual=False,
        norm_group=0,
        adapter=0,
        head="mlp",
        hidden=-1,
        dim=128,
        prototypes=(),
    )
    return ConfigDict({**spec, "backbone": backbone, **fields})


def relative_error(ours, reference):
    """Largest absolute difference over the largest absolute reference value."""
    reference = np.asarray(reference, np.float64)
    return np.max(np.abs(np.asarray(ours, np.float64) - reference)) / np.max(np.abs(reference))


def single(function, *args):
    """Calls a function that uses collectives, compiled, as the only replica."""
    add = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
    out = jax.jit(jax.vmap(function, axis_name=AXIS))(*add)
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


class TinyBackbone(nn.Module):
    """Four means of an image - Linear - BatchNorm - tanh: compiles in a moment, without ties."""

    width: int = 4
    stem: str = "small"
    norm_group: int = 0
    dtype: jnp.dtype = jnp.float32

    @property
    def out_features(self):
        return self.width

    @nn.compact
    def __call__(self, images, *, norm):
        odd = images.shape[1] % 2
        images = jnp.pad(images, ((0, 0), (0, odd), (0, odd), (0, 0)))
        n, side = len(images), images.shape[1] // 2
        x = images.reshape(n, 2, side, 2, side, 3).mean((2, 4)).reshape(n, -1)
        x = nn.Dense(self.width, use_bias=False, dtype=self.dtype)(x)
        x = jnp.tanh(BatchNorm(group=self.norm_group)(x, norm=norm))
        return x.astype(jnp.float32)


@contextlib.contextmanager
def tiny_backbone():
    """Lets configs name a `TinyBackbone` "tiny"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "tiny", (TinyBackbone, {}))
        yield


# Of every building block of a network one or two, as narrow as may be.
_CUT = {
    "resnet": dict(stage_sizes=(1, 1), width=8),
    "efficientnet": dict(repeats=(1, 2, 1, 0, 0, 0, 0)),
    "vit": dict(width=24, heads=3, patch=4, depth=2, grid=4),
    "xcit": dict(width=32, heads=2, patch=8, depth=1, class_blocks=1),
}


def cut_backbone(name, **fields):
    """A network of `models.BACKBONES` without the repetitions: all that depth does not change."""
    made, variant = models.BACKBONES[name]
    if "stages" in variant:  # MobileNets; the first block of the sixth stage has all there is
        stages = variant["stages"]
        cut = dict(stages=(stages[0], stages[1][:2], stages[5][:1]))
    else:
        cut = next(cut for family, cut in _CUT.items() if family in name)
    return made(**{**variant, **cut, **fields})


def tiny_variables(arrays, prefix):
    """The variables of a `TinyEncoder` from a recorded PyTorch state."""
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
    """A recipe that leaves its images alone."""

    def photometric(self, views, key, positions):
        return views


# Recipes of views of two sizes, and all.
MULTICROP = (
    "swav", "swav_disco", "dino", "dino_disco", "sslight_moco", "sslight_swav", "sslight_dino",
)  # fmt: skip
RECIPES = (
    "moco_v2",
    "disco",
    "disco_star",
    "seed",
    "seed:views=cross",
    "seed:views=small_patch",
    "retro",
    "retro:symmetric=false",
    "rkd",
    "attention",
    "disco_seed:rkd=true",
    "squared_distance",
    "binary_contrast",
    "barlow_twins",
    "online_clusters",
    "pseudo_labels",
    "simreg",
    "compress",
    "compress:queues=1",
    "bingo",
    "ressl",
    *MULTICROP,
)


_WITHOUT_TEACHER = (
    "moco_v2", "ressl", "pseudo_labels",
    "swav", "dino", "sslight_moco", "sslight_swav", "sslight_dino",
)  # fmt: skip


def has_teacher(recipe):
    """Whether a recipe takes the argument `teacher`."""
    return recipe.partition(":")[0] not in _WITHOUT_TEACHER


QUIET = {}  # changes that a test makes to every smoke config


@contextlib.contextmanager
def tiny_networks():
    """Inside, "tiny" names a `TinyBackbone`, and smoke configs have no other network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "tiny", (TinyBackbone, {}))
        for network in ("student", "teacher"):
            patch.setitem(QUIET, f"{network}.backbone", "tiny")
        yield


@contextlib.contextmanager
def programs_kept(folder):
    """Inside, equal programs compile once: as the command line keeps them for the next start."""

    def keep(**fields):
        for name, value in fields.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()  # it may have opened another folder before

    changes = {
        "enable_compilation_cache": True,
        "compilation_cache_dir": str(folder),
        "persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, f"jax_{name}") for name in changes}
    keep(**changes)
    try:
        yield
    finally:
        keep(**before)


def smoke_config(recipe, **changes):
    """A shipped recipe with numbers so small that its step compiles in seconds."""
    name, _, given = recipe.partition(":")
    arg = "student=resnet8,smoke=true,data=digits"
    if has_teacher(name):
        arg += ",teacher=resnet8"
    config = flags.load(f"{name}:{arg}" + (f",{given}" if given else ""))
    config.augment.size, config.local.size = 16, 8
    config.student.width = config.teacher.width = 4
    if config.bags.sampling == "clusters" or config.objectives.bags.weight:
        config.bags.file = "bags.npz"  # which is not read before a run starts
    config.log.report = False  # which has tests of its own
    config.update_from_flattened_dict({**QUIET, **changes})
    return teacher.resolve(config)


def tiny_config(recipe, **changes):
    """`smoke_config` within `tiny_backbone`, of which a step compiles in a few seconds."""
    changes = {"student.backbone": "tiny", **changes}
    if has_teacher(recipe):
        changes["teacher.backbone"] = "tiny"
    return only_cropped(smoke_config(recipe, **changes))


def only_cropped(config):
    """A config without what acts on pixels, which is half of what a tiny step compiles."""
    for part in (config.augment, config.local):
        with part.ignore_type():  # some recipes have a number for each view
            part.update({name: 0.0 for name in part if name.endswith("_prob")})
    return config


def compile_once(monkeypatch):
    """From now on runs share what the first of them prepared, and so the compiled step."""
    from disco_jax.tasks import pretrain

    made, real = [], pretrain.prepare
    monkeypatch.setattr(
        pretrain, "prepare", lambda *args: made[0] if made else made.append(real(*args)) or made[0]
    )
    monkeypatch.setattr(pretrain.step, "parallel", functools.cache(pretrain.step.parallel))


def network_run(folder, data_file, recipe="moco_v2", seed=0, **changes):
    """The directory of a run whose student has only begun, on the images of an .npz file."""
    config = smoke_config(recipe, **changes)
    config.data.source, config.data.dir, config.seed = "npz", str(data_file), seed
    encoder = models.build_encoder(config.student)
    student = encoder.create(seed, config.augment.size)
    begun = state.TrainState(np.int32(0), student, {}, {}, ())
    with claim(str(folder), config), contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(0, begun, [[0, 0]], {})
        checkpoints.wait()
    return str(folder)


def smoke(config, replicas):
    """(step of one replica, state, frozen, batch with a leading replica axis)."""
    recipe = views.build(config.augment, config.views, config.local)
    method = methods.build(config, config.views, config.local.count)
    method = method.paced(10)
    config = ConfigDict({**config.to_dict(), "total_epochs": 5})
    train_step, learner = from_config(config, method, recipe, 10)
    size = config.augment.size
    frozen = {}
    if "teacher" in method.plan:
        frozen["teacher"] = method.networks["teacher"].encoder.create(1, size)
    train_state = state.create(method, learner.tx, config.seed, size, reused=frozen.get("teacher"))
    rng = np.random.default_rng(0)
    shape = (replicas, config.batch_size // replicas)
    crops = {
        v: rng.integers(0, 256, (*shape, side, side, 3), np.uint8)
        for v, side in enumerate(recipe.sizes)
    }
    aux = {"cluster": rng.integers(0, 16, shape, np.int32)} if config.bags.file else {}
    return train_step, train_state, frozen, {"views": crops, "aux": aux}


@functools.cache
def digits():
    """scikit-learn's handwritten digits as the arrays of an .npz file: 1437 train, 360 test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    loaded = load_digits()
    images = np.round(loaded.images * (255 / 16)).astype(np.uint8)
    rows = train_test_split(
        np.arange(len(images)), test_size=360, random_state=0, stratify=loaded.target
    )
    made = {}
    for split, chosen in zip(("train", "test"), rows, strict=True):
        made[f"{split}_images"], made[f"{split}_labels"] = images[chosen], loaded.target[chosen]
    return made


def digits_splits():
    """The digits as `ArraySource` takes them."""
    made = digits()
    return {s: (made[f"{s}_images"], made[f"{s}_labels"]) for s in ("train", "test")}


def crop(size=8, **changes):
    """How a view is cut out of an image."""
    fields = dict(
        size=size,
        scale=(0.2, 1.0),
        ratio=(3 / 4, 4 / 3),
        interpolation="bilinear",
        antialias="exact",
    )
    return types.SimpleNamespace(**{**fields, **changes})


def same_batches(ours, theirs):
    """Asserts that two lists of host batches are equal."""
    assert [b.position for b in ours] == [b.position for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.views.keys() == b.views.keys()
        for view in a.views:
            np.testing.assert_array_equal(a.views[view], b.views[view])
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.rows, b.rows)


def one_device_flags():
    """XLA_FLAGS of a child process with one device, whatever this process has."""
    words = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(w for w in words if "device_count" not in w)


def flags_config(words):
    """The config that the command line `disco-jax WORDS` resolves to."""
    return flags.parse(words[0], words[1:], help_line="").config


def restore(folder, like):
    """`Checkpoints.restore` of a run's directory, closed afterwards."""
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        return checkpoints.restore(like)


@contextlib.contextmanager
def devices(count):
    """As if this process had so few devices."""
    some = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: some)
        patch.setattr(jax, "local_devices", lambda *_, **__: some)
        patch.setattr(jax, "device_count", lambda *_: count)
        patch.setattr(jax, "local_device_count", lambda *_: count)
        yield
