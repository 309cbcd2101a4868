"""MoCo checkpoints of the PyTorch world as teachers: whole, checked, and never executed."""

import io
import pathlib
import pickle
import zipfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

import helpers
import reference_weights
from disco_jax import convert, models
from disco_jax.errors import UserError
from disco_jax.train import teacher

SPEC = dict(width=0, stem="imagenet", zero_init_residual=False, norm_group=0)


@pytest.fixture(scope="module")
def state():
    """A whole MoCo ResNet-18 checkpoint: both encoders, queue and pointer."""
    meta, _ = helpers.fixture("models/moco_resnet18")
    made = reference_weights.make_state_dict(meta["manifest"], 0, 1.0)
    made["module.queue"] = made["module.queue"][:, :256]
    made["module.queue_ptr"] = np.array([64])
    return made


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "moco.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
    return path


def spec(file, **changes):
    described = convert.describe(convert.read(file), str(file))._asdict()
    return ConfigDict({**SPEC, **described, "weights": str(file), **changes})


def test_a_file_is_recognised_and_becomes_a_teacher(file, state):
    config = spec(file)
    assert (config.backbone, config.hidden, config.dim) == ("resnet18", 512, 128)
    loaded = teacher.load(config, models.build_encoder(config), 32)
    np.testing.assert_array_equal(
        loaded.variables["params"]["backbone"]["conv1"]["kernel"],
        state["module.encoder_q.conv1.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(loaded.queue.vectors, state["module.queue"].T)
    assert loaded.queue.pointer == 64


def test_the_query_encoder_is_taken_not_the_teacher_beside_it():
    """A DisCo file holds `teacher_encoder_q.` too, which contains `encoder_q.`."""
    meta, _ = helpers.fixture("models/disco_resnet18")
    made = reference_weights.make_state_dict(meta["manifest"], 0, 1.0)
    assert convert.describe(made, "it") == ("resnet18", 2048, 128)


def test_surplus_missing_and_misshaped_keys_are_listed(state):
    described = dict(backbone="resnet18", hidden=512, dim=128)
    encoder = models.build_encoder(ConfigDict(SPEC | described))
    like = jax.eval_shape(lambda: encoder.create(0, 32))
    broken = dict(state)
    del broken["module.encoder_q.layer1.0.bn1.bias"]
    broken["module.encoder_q.extra.weight"] = np.zeros(3)
    broken["module.encoder_q.fc.2.weight"] = np.zeros((64, 512))
    with pytest.raises(UserError) as error:
        convert.from_state_dict(broken, like, "broken.pth")
    for part in (
        "missing: params/backbone/layer1_0/bn1/bias",
        "left over: extra.weight",
        "params/head/out/kernel: shape (512, 64) instead of (512, 128)",
    ):
        assert part in str(error.value)


def test_another_network_than_described_is_refused(file):
    with pytest.raises(UserError, match="does not fit the network"):
        config = spec(file, backbone="resnet34")
        teacher.load(config, models.build_encoder(config), 32)
    with pytest.raises(UserError, match="does not hold a ResNet"):
        convert.describe({"blocks.0.attn.qkv.weight": np.zeros((3, 3))}, "vit.pth")


def test_damaged_and_strange_files_are_refused(tmp_path, file):
    truncated = tmp_path / "cut.safetensors"
    truncated.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        convert.read(truncated)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="neither"):
        convert.read(tmp_path / "weights.bin")
    with pytest.raises(UserError, match="is not a file"):
        convert.read(tmp_path / "nothing.pth")


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_pytorch_files_are_read_and_hostile_ones_are_not_executed(tmp_path, state):
    torch = pytest.importorskip("torch")
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    path = tmp_path / "moco.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": tensors}, path)
    read = convert.read(path)
    assert read.keys() == state.keys()
    np.testing.assert_array_equal(read["module.queue"], state["module.queue"])
    hostile, trap = tmp_path / "hostile.pth", tmp_path / "trap"
    torch.save({"state_dict": Hostile(trap)}, hostile)
    with pytest.raises(UserError, match="more than weights"):
        convert.read(hostile)
    assert not trap.exists()


def test_without_pytorch_the_extra_is_named(tmp_path, monkeypatch):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    path = tmp_path / "moco.pth"
    path.write_bytes(content.getvalue())
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"disco-jax\[torch\]"):
        convert.read(path)
