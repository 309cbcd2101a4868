"""PyTorch checkpoints as networks and teachers: complete, recognised, checked."""

import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import helpers
from disco_jax import convert, models
from disco_jax.errors import UserError
from disco_jax.train import teacher


@pytest.fixture(scope="module")
def state():
    """A whole MoCo ResNet-18 checkpoint: both encoders, a short queue and its pointer."""
    checkpoint = dict(helpers.recorded_state("moco_resnet18")[2])
    checkpoint["module.queue"] = checkpoint["module.queue"][:, :256]
    checkpoint["module.queue_ptr"] = np.array([64])
    return checkpoint


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "moco.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
    return path


def spec(file, **changes):
    fields = dict(backbone="resnet18", weights=str(file), head="auto")
    return helpers.teacher_spec(**{**fields, **changes})


def test_a_file_gives_an_encoder_and_its_variables(file, state):
    encoder, variables = convert.load(file)
    kernel = variables["params"]["backbone"]["conv1"]["kernel"]
    np.testing.assert_array_equal(
        kernel, state["module.encoder_q.conv1.weight"].transpose(2, 3, 1, 0)
    )
    out = encoder.apply(variables, np.ones((1, 32, 32, 3), np.float32), norm="running")
    assert out.features.shape == (1, 512) and out.embedding.shape == (1, 128)
    assert out.scores is None
    again, _ = convert.from_state_dict(state)
    assert again == encoder


def test_a_file_is_a_teacher_with_its_queue(file, state):
    config = teacher.fill(spec(file))
    assert (config.head, config.hidden, config.dim) == ("mlp", 512, 128)
    loaded = teacher.load(config, models.build_encoder(config), 32)
    np.testing.assert_array_equal(loaded.queue.vectors, state["module.queue"].T)
    assert loaded.queue.pointer == 64


def test_a_teacher_described_otherwise_is_refused(file):
    with pytest.raises(UserError, match=r"contains a 'resnet18'\. Set --config"):
        teacher.fill(spec(file, backbone="resnet34"))
    for changes, message in (
        (dict(hidden=2048), "config.teacher.hidden=2048, but the weights have 512"),
        (dict(dim=64), "config.teacher.dim=64, but the weights have 128"),
        (dict(head="mlp_unit"), "config.teacher.head='mlp_unit', but the weights have 'mlp'"),
    ):
        config = spec(file, **{"head": "mlp", **changes})
        with pytest.raises(UserError, match="not the one in the config") as error:
            teacher.load(config, models.build_encoder(config), 32)
        assert message in str(error.value)


def test_the_same_network_in_other_words_is_taken(file):
    config = spec(file, head="mlp", hidden=-1, stem="imagenet", width=64)
    assert teacher.load(config, models.build_encoder(config), 32).queue is not None


def test_surplus_missing_and_misshaped_keys_are_listed(state):
    broken = dict(state)
    del broken["module.encoder_q.layer1.0.bn1.bias"]
    broken["module.encoder_q.extra.weight"] = np.zeros(3)
    broken["module.encoder_q.layer2.0.bn1.weight"] = np.zeros(64)
    with pytest.raises(UserError) as error:
        convert.from_state_dict(broken)
    for part in (
        "missing: params/backbone/layer1_0/bn1/bias",
        "left over: module.encoder_q.extra.weight",
        "module.encoder_q.layer2.0.bn1.weight: shape (64,)",
    ):
        assert part in str(error.value)
    assert "encoder_k" not in str(error.value)


def test_patterns_allow_what_is_missing_or_left_over(state):
    broken = dict(state)
    missing = broken.pop("module.encoder_q.layer1.0.bn1.bias")
    broken["module.encoder_q.extra.weight"] = np.zeros(3)
    _, variables = convert.from_state_dict(
        broken, allow=("*.extra.*", "params/backbone/layer1_0/bn1/*")
    )
    bias = variables["params"]["backbone"]["layer1_0"]["bn1"]["bias"]
    assert bias.shape == missing.shape and not bias.any()
    with pytest.raises(UserError, match="missing"):
        convert.from_state_dict(broken, allow=("*.extra.*",))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(arch="resnet50"), "holds a resnet18, not a resnet50"),
        (dict(arch="resnet81"), "arch='resnet81' is not known. Did you mean 'resnet8'"),
        (dict(family="mocow2"), "family='mocow2' is not known. Did you mean 'moco_v2'"),
        (dict(prefix="module.teacher."), "holds networks under 'module.encoder_k.', 'module.enc"),
    ],
)
def test_mistaken_options_are_told(state, options, message):
    with pytest.raises(UserError, match=message):
        convert.from_state_dict(state, **options)


def test_a_head_of_another_width_is_its_own(state):
    """Reads the head's width from the file instead of assuming one."""
    wide = dict(state)
    wide["module.encoder_q.fc.0.weight"] = np.zeros((700, 512), np.float32)
    wide["module.encoder_q.fc.0.bias"] = np.zeros(700, np.float32)
    wide["module.encoder_q.fc.2.weight"] = np.zeros((32, 700), np.float32)
    wide["module.encoder_q.fc.2.bias"] = np.zeros(32, np.float32)
    imported = convert.from_mapping(wide)
    assert (imported.spec["hidden"], imported.spec["dim"]) == (700, 32)
    assert imported.queue is None  # its width differs from the embedding's
    del wide["module.encoder_q.fc.0.bias"]
    with pytest.raises(UserError, match="missing: params/head/hidden/bias"):
        convert.from_mapping(wide)


def test_nothing_known_is_said_with_what_was_there():
    with pytest.raises(UserError, match=r"does not hold a known network: 1 arrays"):
        convert.from_state_dict({"blocks.weight": np.zeros((3, 3))})
    with pytest.raises(UserError, match="0 arrays, among them none"):
        convert.from_state_dict({})


def test_files_that_are_not_there_or_damaged_are_refused(tmp_path, file):
    truncated = tmp_path / "cut.safetensors"
    truncated.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "weights.pth").write_bytes(b"x" * 100)
    (tmp_path / "empty.pth").write_bytes(b"")
    for name, message in (
        ("cut.safetensors", "damaged"),
        ("nothing.pth", "does not exist"),
        ("weights.pth", "weights.pth"),
        ("empty.pth", "empty.pth"),
        ("", "is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            convert.load(tmp_path / name)


@pytest.mark.parametrize(
    "container, wrap",
    [
        ("state_dict", lambda s: {"epoch": 200, "arch": "resnet18", "state_dict": s}),
        ("model", lambda s: {"opt": "text", "model": s, "optimizer": {}, "epoch": 1}),
        ("teacher", lambda s: {"student": {}, "teacher": s, "epoch": 1}),
        ("model.state_dict", lambda s: {"model": {"state_dict": s}}),
        ("state_dict", lambda s: {f"top{n}": np.ones(3) for n in (1, 5)} | {"state_dict": s}),
        ("", lambda s: s),
    ],
)
def test_the_state_dict_is_found_in_its_container(tmp_path, state, container, wrap):
    few = {k: v for k, v in state.items() if k.startswith("module.encoder_q.")}
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps(wrap(few)))
    arrays, entry = convert.read(path)
    assert entry == container and arrays.keys() == few.keys()


def test_another_entry_can_be_asked_for(tmp_path, state):
    few = {k: v for k, v in state.items() if k.startswith("module.encoder_q.")}
    other = {**few, "module.encoder_q.conv1.weight": few["module.encoder_q.conv1.weight"] + 1}
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps({"student": other, "teacher": few}))
    imported = convert.read_network(path, entry="student")
    assert imported.container == "student"
    np.testing.assert_array_equal(
        imported.variables["params"]["backbone"]["conv1"]["kernel"],
        other["module.encoder_q.conv1.weight"].transpose(2, 3, 1, 0),
    )
    with pytest.raises(UserError, match="Did you mean 'student'"):
        convert.load(path, entry="studnt")


def test_a_file_without_weights_is_refused(tmp_path):
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps({"epoch": 3, "optimizer": {"lr": 0.1}}))
    with pytest.raises(UserError, match="holds no state dict; it holds: epoch, optimizer"):
        convert.load(path)


def test_leaves_are_numpy_float32(state):
    _, variables = convert.from_state_dict(state)
    leaves = jax.tree.leaves(variables)
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in leaves)
