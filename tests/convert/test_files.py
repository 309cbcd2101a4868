"""Files of weights: types of numbers, several files, hostile names, objects of classes."""

import json
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layouts import small, two_layers
from test_pickles import FLOATS, op, program, tensor, zipped

from disco_jax import convert, main
from disco_jax.convert import machine, pickles
from disco_jax.errors import UserError
from disco_jax.evaluate import open_model
from disco_jax.train import teacher

STATE = {
    key: np.random.default_rng(len(key)).uniform(0.5, 1.0, value.shape).astype(np.float32)
    for key, value in (small() | two_layers("fc.")).items()
}
TYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.complex64): "C64",
    np.dtype(np.int64): "I64",
}


def safetensors(path, arrays, **changes):
    """Writes a safetensors file; `changes` replace fields of the first array's header."""
    header, blobs, start = {"__metadata__": {"format": "pt"}}, [], 0
    for key, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        described = {"dtype": TYPES[array.dtype], "shape": list(array.shape)}
        header[key] = described | {"data_offsets": [start, start + len(raw)]}
        blobs.append(raw)
        start += len(raw)
    header[next(iter(arrays))].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    return path


def test_a_safetensors_file_is_read_as_its_own_library_writes_it(tmp_path):
    others = {"i": np.arange(3), "b": np.array([True, False]), "e": np.zeros((0, 2), np.float16)}
    save_file(STATE | others, tmp_path / "a.safetensors", {"format": "pt"})
    arrays, container = convert.read(tmp_path / "a.safetensors")
    assert container == "" and arrays.keys() == STATE.keys() | others.keys()
    for key, value in (STATE | others).items():
        assert arrays[key].dtype == value.dtype
        np.testing.assert_array_equal(arrays[key], value)
    with pytest.raises(UserError, match="has no entries: leave out --entry=model"):
        convert.read(tmp_path / "a.safetensors", "model")


def test_bfloat16_is_read_and_float8_is_refused_for_what_it_is(tmp_path):
    half = {key: value.astype(ml_dtypes.bfloat16) for key, value in STATE.items()}
    _, variables = convert.load(safetensors(tmp_path / "a.safetensors", half))
    bias = variables["params"]["head"]["out"]["bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, half["fc.2.bias"].astype(np.float32))
    quarter = {key: value.astype(ml_dtypes.float8_e4m3fn) for key, value in STATE.items()}
    with pytest.raises(
        UserError, match=r"the type F8_E4M3 \(conv1\.weight\), which is not supported"
    ):
        convert.load(safetensors(tmp_path / "b.safetensors", quarter))
    typed = tensor((4,), (1,), make="_rebuild_tensor_v3", kind="torch.storage.UntypedStorage")
    typed = typed.replace(op(None) + b"tR", op(None) + b"ctorch\nfloat8_e5m2\nNtR")
    (tmp_path / "c.pth").write_bytes(zipped(program(typed), {"0": b"abcd"}))
    with pytest.raises(UserError, match=r"the type torch\.float8_e5m2, which is not supported"):
        convert.load(tmp_path / "c.pth")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(shape=[3]), "does not match its shape"),
        (dict(shape=[-4]), "an invalid shape"),
        (dict(shape=[2**40, 2**40]), "is cut off"),
        (dict(shape="4"), "an invalid shape"),
        (dict(data_offsets=[4, 20]), "does not start where the previous array ends"),
        (dict(data_offsets=[0, 4, 8]), "an invalid shape or offset"),
        (dict(dtype=["F32"]), "damaged"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(changes, message, tmp_path):
    path = safetensors(tmp_path / "a.safetensors", {"x": np.zeros(4, np.float32)}, **changes)
    with pytest.raises(UserError, match=rf"a\.safetensors .*{message}"):
        convert.read(path)


def test_safetensors_files_that_end_early_or_late_are_refused(tmp_path):
    path = safetensors(tmp_path / "a.safetensors", {"x": np.zeros(4, np.float32)})
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], whole[:4], b"", whole + b"1", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.safetensors (is|ends)"):
            convert.read(path)
    twice = b'{"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "x": 1}'
    path.write_bytes(struct.pack("<Q", len(twice)) + twice)
    with pytest.raises(UserError, match="names an array twice"):
        convert.read(path)


@pytest.fixture
def sharded(tmp_path):
    """A folder with a network in two files, as the Hugging Face libraries write it."""
    folder = tmp_path / "network"
    folder.mkdir()
    halves = [dict(list(STATE.items())[i::2]) for i in (0, 1)]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        safetensors(folder / name, half)
    index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text('{"architectures": ["ResNet"]}')
    return folder


def test_weights_in_several_files_are_read_by_their_index(sharded, tmp_path, capsys):
    for path in (sharded, sharded / "model.safetensors.index.json"):
        arrays, _ = convert.read(path)
        assert arrays.keys() == STATE.keys()
        for key in STATE:
            np.testing.assert_array_equal(arrays[key], STATE[key])
    assert main.main(["import", str(sharded), "--workdir", str(tmp_path / "run")]) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (
        manifest["bytes"] == sum(p.stat().st_size for p in sharded.glob("model*"))
        and len(manifest["sha256"]) == 64
    )


def test_a_folder_of_several_files_is_a_teacher_and_can_be_deployed(sharded):
    """Ignores the folder's config.json, which is not a run's."""
    assert teacher.describe(str(sharded)).hidden == 24
    opened = open_model.open_model(str(sharded))
    np.testing.assert_array_equal(
        opened.variables["params"]["head"]["out"]["bias"], STATE["fc.2.bias"]
    )


def test_a_folder_with_one_file_of_weights_is_that_file(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert convert.read(tmp_path)[0].keys() == STATE.keys()


def test_an_index_that_does_not_fit_its_files_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    key = next(iter(good))
    for changed, message in (
        ({**good, key: "../../etc/passwd"}, "a file outside its folder"),
        ({**good, "more.weight": good[key]}, "only one of them has more.weight"),
        ({k: v for k, v in good.items() if k != key}, f"only one of them has {key}"),
        ({**good, key: "model-3.safetensors"}, r"model-3\.safetensors, which its folder does"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(UserError, match=message):
            convert.read(sharded)
    for text in ("[1, 2", "[]", '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index\.json"):
            convert.read(sharded)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused_with_their_names(value):
    state = {**STATE, "bn1.running_var": np.full(4, value)}
    state["fc.0.bias"] = np.where(np.arange(24) == 3, value, 0.5)
    count = sum("num_batches" not in key for key in STATE)
    message = rf"NaN or infinite weights, in 2 of {count} arrays \(bn1\.running_var, fc\.0\.bias\)"
    with pytest.raises(UserError, match=message):
        convert.from_mapping(state)


def test_a_queue_that_is_not_finite_is_refused():
    state = {f"module.encoder_q.{key}": value for key, value in STATE.items()}
    state["module.queue"] = np.full((32, 8), np.inf, np.float32)
    with pytest.raises(UserError, match=r"infinite weights.*module\.queue"):
        convert.from_mapping(state)


@pytest.mark.parametrize("kind", ["complex64", "int8", "bool"])
def test_weights_that_are_no_floating_point_numbers_are_refused(kind):
    state = {**STATE, "conv1.weight": STATE["conv1.weight"].astype(kind)}
    with pytest.raises(UserError, match=rf"{kind} numbers as weights, in 1 of .*conv1\.weight"):
        convert.from_mapping(state)


ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\n"


def test_control_characters_of_a_file_are_never_printed(tmp_path, capsys):
    """Covers left-over keys, files without a network, entries, other modules and NaN weights."""
    contents = (
        {**STATE, f"layer1.{ESCAPE}": np.ones(3)},
        {f"{ESCAPE}.weight": np.ones((3, 3))},
        {ESCAPE: {"weight": np.ones((3, 3))}, "other": {"weight": np.ones((3, 3))}},
        {ESCAPE: 1},
        {f"backbone.{k}": v for k, v in STATE.items() if "fc" not in k}
        | {f"{ESCAPE}.weight": np.ones((3, 3))},
        {f"{ESCAPE}.{k}": v for k, v in STATE.items()}
        | {f"b.{ESCAPE}.{k}": v for k, v in STATE.items()},
        {**STATE, "fc.0.weight": np.full((24, 16), np.nan), f"fc.{ESCAPE}": np.ones(3)},
    )
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps(content))
        for more in ([], ["--entry=x"]):
            arguments = ["import", str(path), "--workdir", str(tmp_path / "run"), *more]
            assert main.main(arguments) == 2
            output = "".join(capsys.readouterr())
            assert output.replace("\n", "").isprintable(), output
            # The message for the seventh reports its NaN; long lists show only the first names.
            assert "owned" in output or number == 6 or more, output
            assert "\x1b" not in output and "\u202e" not in output
    path = tmp_path / "a.safetensors"
    key = np.zeros(4, np.float32)
    safetensors(path, {ESCAPE: key}, shape=[-1])
    assert main.main(["import", str(path), "--workdir", str(tmp_path / "run")]) == 2
    assert "\x1b" not in "".join(capsys.readouterr())


def saved_module(kind, *, inside=b"}"):
    """Returns the opcodes that torch.save(model) writes: an object with parameters and modules."""
    module, _, name = kind.rpartition(".")
    state = b"}(" + op("_parameters") + b"}" + op("_modules") + inside + b"u"
    return f"c{module}\n{name}\n)\x81".encode("latin-1") + state + b"b"


def test_a_whole_model_says_to_save_its_state_dict(tmp_path):
    net = saved_module("torchvision.models.resnet.ResNet")
    parallel = saved_module(
        "torch.nn.parallel.data_parallel.DataParallel", inside=b"}" + op("module") + net + b"s"
    )
    for pickled, name in (
        (net, "torchvision.models.resnet.ResNet"),
        (parallel, "torch.nn.parallel.data_parallel.DataParallel"),
        (b"}" + op("model") + net + b"s", "torchvision.models.resnet.ResNet"),
    ):
        (tmp_path / "model.pth").write_bytes(zipped(program(pickled)))
        with pytest.raises(UserError, match=rf"{name}, .* save model\.state_dict\(\) instead"):
            convert.load(tmp_path / "model.pth")
    function = program(b"ctorch.nn.functional\nrelu\n")
    (tmp_path / "model.pth").write_bytes(zipped(function))
    with pytest.raises(UserError, match=r"nothing was run.*save model\.state_dict\(\) instead"):
        convert.load(tmp_path / "model.pth")


def test_a_great_many_objects_are_refused_before_they_cost_time(tmp_path):
    """Refuses over 100,000 objects: 500,000 took 14 s, and checkpoints have a few thousand."""
    some, many = (
        b"csome_package\nThing\nq\x000(" + b"h\0)\x81" * count + b"l"
        for count in (1000, machine._MAX_STUBS + 1)
    )
    weights = op("w") + tensor((4,), (1,))
    path = tmp_path / "a.pth"
    path.write_bytes(zipped(program(b"}(", weights, op("x"), some, b"u"), {"0": FLOATS}))
    assert len(pickles.read(path)["x"]) == 1000
    path.write_bytes(zipped(program(b"}(", weights, op("x"), many, b"u"), {"0": FLOATS}))
    with pytest.raises(UserError, match=r"more than 100,000 objects .* some_package\.Thing"):
        pickles.read(path)
    nested = b")" + b"q\1h\1\x86" * 60  # hashing it would take exponential time
    path.write_bytes(zipped(program(b"}", op("x"), nested, nested, b"\x93s")))
    with pytest.raises(UserError, match="the name of a class is not a string"):
        pickles.read(path)
