"""PyTorch checkpoints without PyTorch: both formats, every kind of tensor, and hostile files.

`torch_files/make.py` wrote the two committed checkpoints. Hostile pickles are assembled from
opcodes; where the standard library's unpickler would run them, the tests verify that too.
"""

import collections
import contextlib
import io
import pathlib
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disco_jax.convert import archive, pickles
from disco_jax.errors import UserError

FILES = pathlib.Path(__file__).parent / "torch_files"
FORMATS = ["zip.pth", "stream.pth"]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STATE = {
    "float32": np.array([[0.5, -1, 2], [3, 4, 5.25]], np.float32),
    "float16": np.array([1, -0.5, 65504], np.float16),
    "bfloat16": np.array([1, -0.5, 3.0e38], BFLOAT16),
    "int64": np.array(7, np.int64),
    "bool": np.array([True, False, True]),
    "empty": np.zeros((0, 3), np.float32),
    "transposed": np.array([[0, 3], [1, 4], [2, 5]], np.float32),
    "head": np.array([0, 1, 2, 3], np.float32),
    "tail": np.array([[4, 5, 6], [7, 8, 9]], np.float32),
    "parameter": np.array([9, 8], np.float32),
}


@pytest.fixture
def load(tmp_path):
    """A function that reads bytes as a file."""

    def load(content):
        (tmp_path / "some.pth").write_bytes(content)
        return pickles.read(tmp_path / "some.pth")

    return load


def equal(actual, expected):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert type(actual[key]) is np.ndarray
        assert (actual[key].dtype, actual[key].shape) == (value.dtype, value.shape), key
        np.testing.assert_array_equal(actual[key], value, err_msg=key)


def zipped(pickled, storages=None, compression=zipfile.ZIP_STORED, **others):
    """Returns a zip archive like torch.save's."""
    members = {"data.pkl": pickled, **{f"data/{k}": v for k, v in (storages or {}).items()}}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {**members, **others}.items():
            archive.writestr(f"a/{name}", content)
    return file.getvalue()


def streamed(pickled, storages=None, magic=0x1950A86A20F9469CFC6C, protocol=1001, little=True):
    """Returns a file like PyTorch's before 1.6; storages are (number of elements, bytes)."""
    header = (magic, protocol, {"little_endian": little})
    storages = storages or {}
    return b"".join(
        [*(pickle.dumps(part, 2) for part in header), pickled, pickle.dumps([*storages], 2)]
        + [struct.pack("<q", count) + raw for count, raw in storages.values()]
    )


def op(value):
    """Returns the opcodes of a value; bytes are returned unchanged."""
    return value if type(value) is bytes else pickle.dumps(value, 2)[2:-1]


def call(name, *arguments):
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n(".encode() + b"".join(map(op, arguments)) + b"tR"


def tensor(
    size, stride, offset=0, key="0", count=4, kind="torch.FloatStorage", make="_rebuild_tensor_v2"
):
    module, _, name = kind.rpartition(".")
    storage = op("storage") + f"c{module}\n{name}\n".encode() + op(key) + op("cpu") + op(count)
    return call(f"torch._utils.{make}", b"(" + storage + b"tQ", offset, size, stride, False, None)


def program(*opcodes):
    return b"\x80\x02" + b"".join(opcodes) + b"."


FLOATS = np.arange(4, dtype=np.float32).tobytes()
CONTAINERS = {"zip": zipped, "stream": streamed, "plain": lambda pickled: pickled}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("remote", [False, True])
def test_a_checkpoint_of_either_format(name, remote, monkeypatch):
    if remote:
        monkeypatch.setattr(pickles.os.path, "isfile", lambda path: False)
    content = pickles.read(str(FILES / name))
    equal(content.pop("state_dict"), STATE)
    momentum = content["optimizer"]["state"].pop(0)
    equal(momentum, {"momentum_buffer": np.array([0.25, 0.75], np.float32)})
    args = content.pop("args")
    assert (type(args), args.name) == (pickles.Stub, "argparse.Namespace")
    assert args.state == {"lr": 0.03, "milestones": [120, 160], "cos": True, "resume": ""}
    group = {"lr": 0.03, "nesterov": False, "params": [0, 1]}
    optimizer = {"state": {}, "param_groups": [group]}
    assert content == {"epoch": 3, "arch": "resnet18", "optimizer": optimizer}


def test_a_plain_pickle_of_arrays(load):
    arrays = {
        "c": STATE["float32"],
        "fortran": STATE["transposed"].T,
        "text": np.array(["a", "bc"]),
    }
    scalar = np.float64(0.1)
    for protocol in range(2, 6):
        content = load(pickle.dumps({"model": arrays, "top1": scalar, "raw": b"\xff"}, protocol))
        equal(content["model"], arrays)
        assert (content["top1"], type(content["top1"]), content["raw"]) == (
            0.1,
            np.float64,
            b"\xff",
        )
    old = pickle.dumps(arrays, 2).replace(b"numpy._core.", b"numpy.core.")
    equal(load(old), arrays)


def test_a_pickle_of_python_2(load):
    """Reads BINSTRINGs, Python 2's str, as keys and as the content of arrays."""
    array = call("numpy.core.multiarray._reconstruct", b"cnumpy\nndarray\n", (0,), b"U\x01b")
    dtype = (
        call("numpy.dtype", b"U\x02u1", 0, 1)
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    state = b"(K\x01" + op((2,)) + dtype + b"\x89U\x02\xff\x01tb"
    equal(load(program(b"}U\x01w", array, state, b"s")), {"w": np.array([255, 1], np.uint8)})


def test_containers_and_names_that_checkpoints_have(load):
    content = {
        "counter": collections.Counter([30, 30, 40]),
        "default": collections.defaultdict(list, {"a": [1]}),
        "set": {1, 2},
        "frozen": frozenset([3]),
        "numbers": (1 + 2j, 2**70, -1, 1e-300, None, True),
        "bytes": b"\x00\xff",
        "type": int,
    }
    for protocol in (2, 4):
        loaded = load(pickle.dumps(content, protocol))
        assert repr(loaded.pop("type")) == "<Stub builtins.int>"
        assert loaded == {key: value for key, value in content.items() if key != "type"}
    torch = [call("torch.Size", (2, 3)), call("torch.device", "cuda", 1), b"ctorch\nbfloat16\n"]
    loaded = load(program(b"}", op("all"), b"(", *torch, b"ts"))
    assert loaded == {"all": ((2, 3), "cuda:1", "torch.bfloat16")}


def test_objects_of_unknown_classes_become_stubs_and_the_tensors_load(load):
    node = call("some_package.config.CfgNode", 1, "x") + op({"depth": 50}) + b"b"
    grown = b"csome_package.lists\nMyList\n)\x81(K\x01K\x02e" + op("k") + op("v") + b"s"
    key = b"c__main__\nColour\nK\x01\x85R" + op("as a key")
    pickled = program(b"}(", op("w"), tensor((4,), (1,)), op("t"), node, op("g"), grown, key, b"u")
    content = load(zipped(pickled, {"0": FLOATS}))
    np.testing.assert_array_equal(content.pop("w"), np.arange(4))
    node, grown = content.pop("t"), content.pop("g")
    assert (node.name, node.state) == ("some_package.config.CfgNode", {"depth": 50})
    assert (type(grown), grown.state) == (pickles.Stub, None)
    [(key, value)] = content.items()
    assert (key.name, value) == ("__main__.Colour", "as a key")


def test_views_of_old_streams(load):
    """Reads storages that are parts of other storages, as PyTorch before 1.x wrote them."""
    whole, view = tensor((4,), (1,)), tensor((2,), (1,)).replace(b"tQ", op(("1", 2, 2)) + b"tQ")
    loaded = load(streamed(program(whole, view, b"\x86"), {"0": (4, FLOATS)}))
    assert [item.tolist() for item in loaded] == [[0, 1, 2, 3], [2, 3]]
    beyond = tensor((2,), (1,)).replace(b"tQ", op(("1", 3, 2)) + b"tQ")
    with pytest.raises(UserError, match="storage of 4"):
        load(streamed(program(beyond), {"0": (4, FLOATS)}))


def traps(trap):
    """Returns pickles that create the file `trap` when run, and others that need torch to run."""
    touch, path = f"touch {trap}", call("pathlib.PosixPath", str(trap))
    method = call("builtins.getattr", b"cpathlib\nPosixPath\n", "touch")
    run = {
        "posix.system": call("posix.system", touch),
        "os.system": call("os.system", touch),
        "eval": call("builtins.eval", f"open({str(trap)!r}, 'w').close()"),
        "eval of Python 2": call("__builtin__.eval", f"open({str(trap)!r}, 'w').close()"),
        "exec": call("builtins.exec", f"open({str(trap)!r}, 'w').close()"),
        "subprocess": call("subprocess.check_call", ["touch", str(trap)]),
        "getattr": method + b"(" + path + b"tR",
        "partial": call("functools.partial", b"cos\nsystem\n", touch) + b")R",
        "copyfile": b"cshutil\ncopyfile\n(" + op(__file__) + op(str(trap)) + b"tR",
        "state": call("argparse.Namespace") + call("posix.system", touch) + b"b",
        "stack": b"\x8c\x05posix\x8c\x06system\x93" + op((touch,)) + b"R",
    }
    return run, {
        "hub": call("torch.hub.load", "a/b", "c"),
        "class": call("subprocess.Popen", ["touch", str(trap)]),
        "path": call("pathlib.PosixPath", str(trap)),
        "class of torch": call("torch.jit.ScriptModule", 1),
        "class of numpy": call("numpy.random.RandomState", 1),
        "nested": call("torch.storage._load_from_bytes", b"C\x01a"),
        "import": call("importlib.import_module", "antigravity"),
        "dotted": b"\x8c\x06pkg.ab\x8c\x0dSome.function\x93)R",
        "lower": call("some_package.utils.make_model", 1),
        "wrapped": b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nN"
        + op((touch,))
        + b"NtR",
    }


@pytest.mark.parametrize("container", CONTAINERS)
def test_nothing_in_a_file_is_executed(container, load, tmp_path):
    trap = tmp_path / "trap"
    run, others = traps(trap)
    for name, opcodes in {**run, **others}.items():
        hostile = program(b"}", op("state_dict"), opcodes, b"s")
        with pytest.raises(UserError, match=r"some.pth asks to run [\w.]+: nothing was run"):
            load(CONTAINERS[container](hostile))
        assert not trap.exists(), name
        if name in run and container == "plain":  # the standard library runs it
            with contextlib.suppress(pickle.UnpicklingError):
                pickle.loads(program(opcodes))
            assert trap.exists(), name
            trap.unlink()


def test_our_own_functions_cannot_be_changed_from_a_file(load):
    ordered_dict = b"ccollections\nOrderedDict\n"
    states = [{"call": 1}, (None, {"call": 1, "name": "posix.system"}), {"__class__": 1}]
    for name in ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "a.B", "typing.Any"):
        for state in states:
            target = "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()
            with pytest.raises(UserError, match="state to an object that cannot have one"):
                load(program(b"}", op("x"), target, op(state), b"bs"))
    assert load(program(b"}", op("x"), ordered_dict, b")Rs")) == {"x": {}}


GOOD = tensor((2, 2), (1, 2))
SHAPE, REACH, SIZE = "an invalid shape", "has a storage of 4", "storage '0' has the wrong size"
COUNT = "storage '0' has an invalid size"
MISSING = r"is not in the archive|does not match its tensors|KeyError"
# Name -> (pattern of the error message, opcodes).
BAD_TENSORS = {
    "stride 0": (REACH, tensor((2**40,), (0,))),
    "stride 0, few": (REACH, tensor((5,), (0,))),
    "out at the end": (REACH, tensor((4,), (1,), offset=1)),
    "out by its stride": (REACH, tensor((2,), (4,))),
    "negative offset": (SHAPE, tensor((1,), (1,), offset=-1)),
    "negative stride": (SHAPE, tensor((2,), (-1,), offset=1)),
    "negative size": (SHAPE, tensor((-1, -4), (1, 1))),
    "long size": (SHAPE, tensor((0, 2**63), (1, 1))),
    "long stride": (SHAPE, tensor((2, 2), (1, 2**64))),
    "overflow": ("ValueError", tensor((2**32, 2**32, 0, 2**62), (1, 1, 1, 1))),
    "ranks": ("ValueError", tensor((2, 2), (1,))),
    "100 dimensions": (SHAPE, tensor((1,) * 100, (1,) * 100)),
    "no number": (SHAPE, tensor((2.0,), (1,))),
    "no storage of its name": (MISSING, tensor((4,), (1,), key="1")),
    "name that climbs": (MISSING, tensor((4,), (1,), key="../data.pkl")),
    "key of another type": ("unknown type", tensor((4,), (1,), key=0)),
    "other count": (SIZE, tensor((4,), (1,), count=3)),
    "count of half": (COUNT, tensor((4,), (1,), count=4.0)),
    "larger elements": (f"{SIZE}|cut off", tensor((2,), (1,), kind="torch.DoubleStorage")),
    "negative count": (COUNT, tensor((0,), (1,), count=-1)),
    "quantized": ("type torch.QInt8Storage", tensor((4,), (1,), kind="torch.QInt8Storage")),
    "unknown storage": ("unknown type, a.MyStorage", tensor((4,), (1,), kind="a.MyStorage")),
    "sparse": ("unsupported kind", call("torch._utils._rebuild_sparse_tensor", 1, (1,))),
    "no storage": ("NoneType", tensor((1,), (1,)).replace(b"tQ", b"t0N")),
    "parameter of none": ("no tensor", call("torch._utils._rebuild_parameter", [1], True, None)),
    "call of a list": ("calls list", b"]" + op((1,)) + b"R"),
    "arguments that are none": ("calls Global", b"ccollections\nOrderedDict\n]R"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(name, load):
    message, opcodes = BAD_TENSORS[name]
    assert load(zipped(program(GOOD), {"0": FLOATS})).tolist() == [[0, 2], [1, 3]]
    for content in (
        zipped(program(opcodes), {"0": FLOATS}),
        streamed(program(opcodes), {"0": (4, FLOATS)}),
    ):
        with pytest.raises(UserError, match=rf"^\S*some\.pth .*({message})"):
            load(content)


def test_any_byte_of_a_bool_is_true_or_false(load):
    content = zipped(program(tensor((4,), (1,), kind="torch.BoolStorage")), {"0": b"\0\1\2\xff"})
    assert load(content).view(np.uint8).tolist() == [0, 1, 1, 1]


@contextlib.contextmanager
def at_most(limit):
    """Asserts that the code inside allocates fewer than `limit` bytes at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def array(raw, dtype, shape, order="C"):
    raw = b"C" + struct.pack("<B", len(raw)) + raw
    return call("numpy._core.numeric._frombuffer", raw, call("numpy.dtype", dtype), shape, order)


def copies(value, make):
    """Returns thousands of calls that each copy a large value."""
    return b"(" + value + b"q\7" + make * 5_000 + b"t"


NESTED = b")" + b"\x85" * 30_000
SHARED = b")" + b"q\0h\0\x86" * 60  # a pair of one pair of one pair of ...
LONG, WIDE = b"](" + b"N" * 30_000 + b"e", op("a" * 30_000)
PAIRS = b"](" + b"K\1K\1\x86" * 20_000 + b"e"
BYTES = b"B" + struct.pack("<I", 30_000) + bytes(30_000)
SCALAR = call("numpy.dtype", "S30000") + b"q\6"
MUCH, DEEP, KEY = "far more than its size", "nests more than", "a container as a key"
BOMBS = {
    "long string": ("ValueError", b"X\xff\xff\xff\x7fa"),
    "longer bytes": ("ValueError", b"\x8e" + struct.pack("<Q", 2**40) + b"a"),
    "longest bytes": ("ValueError", b"\x8e" + struct.pack("<Q", 2**63) + b"a"),
    "byte array": ("ValueError", b"\x96" + struct.pack("<Q", 2**40) + b"a"),
    "long number": ("ValueError", b"\x8b\xff\xff\xff\x7fa"),
    "negative length": ("ValueError", b"\x8b\xff\xff\xff\xffa"),
    "number as text": ("ValueError", b"I" + b"9" * 100_000 + b"\n"),
    "nested lists": (DEEP, b"]" * 30_000 + b"a" * 29_999),
    "nested tuples": (DEEP, NESTED),
    "list in itself": (DEEP, b"]q\0h\0a"),
    "nested key": (KEY, b"}" + NESTED + b"Ns"),
    "nested shared key": (KEY, b"}" + SHARED + b"Ns"),
    "nested shared member": (KEY, b"\x8f(" + SHARED + b"\x90"),
    "nested frozen member": (KEY, b"(" + SHARED + b"\x91"),
    "nested storage key": (
        "unknown type",
        b"(" + op("storage") + b"ctorch\nFloatStorage\n" + SHARED + b"NK\1tQ",
    ),
    "nested type": ("TypeError", b"cnumpy\ndtype\n" + SHARED + b"\x85R"),
    "copies of a list": (MUCH, copies(LONG, b"cbuiltins\nlist\nh\7\x85R")),
    "copies of pairs": (MUCH, copies(PAIRS, b"ccollections\nOrderedDict\nh\7\x85R")),
    "copies of a string": (MUCH, copies(WIDE, b"c_codecs\nencode\nh\7\x85R")),
    "copies of a device": (MUCH, copies(WIDE, b"ctorch\ndevice\nh\7K\1\x86R")),
    "copies of a name": ("more than 300", copies(op("A" * 30_000), b"h\7h\7\x93")),
    "copies of an array": (
        MUCH,
        copies(SCALAR + b"0" + BYTES, b"cnumpy.core.multiarray\nscalar\nh\6h\7\x86R"),
    ),
    "zeros": ("TypeError", call("builtins.bytes", 10**9)),
    "byte array of zeros": ("asks to run builtins.bytearray", call("builtins.bytearray", 10**9)),
    "wide dtype": ("has 1 bytes", array(b"a", "S1000000000", ())),
    "empty items": ("of the type S0", array(b"", "S0", (9**9,))),
    "objects": ("of the type O8", array(b"12345678", "O8", ())),
    "dates": ("of the type M8", array(b"12345678", "M8", ())),
    "wrong shape": ("has 4 bytes", array(b"abcd", "u1", (2**40,))),
    "negative shape": (SHAPE, array(b"abcd", "u1", (-1, -4))),
    "shape that is a list": (SHAPE, array(b"abcd", "u1", [4])),
    "array of numbers": ("no bytes", call("numpy._core.multiarray.scalar", "f4", [1])),
    "array without content": (
        "without content",
        call("numpy._core.multiarray._reconstruct", None, (10**9,), b"C\1b"),
    ),
    "array as storage": (
        SHAPE,
        call(
            "torch._utils._rebuild_tensor_v2", array(b"abcd", "u1", (2, 2), "F"), 0, (2,), (1,), 0
        ),
    ),
    "big-endian": (
        "big-endian",
        call("numpy.dtype", "f4") + op((3, ">", None, None, None, -1, -1, 0)) + b"b",
    ),
    "extension": ("opcode EXT1", b"\x82\1"),
    "buffer": ("opcode NEXT_BUFFER", b"\x97"),
    "old instance": ("opcode INST", b"(ios\nsystem\n"),
    "empty stack": ("the stack is empty", b"0" * 9),
    "no mark": ("IndexError", b"t"),
    "no memo": ("KeyError", b"h\7"),
    "no key": ("ValueError", b"}(K\1K\2K\3u"),
    "number of a list": ("a number from another type", call("builtins.int", [1])),
    "set of text": ("a set from another type", call("builtins.set", "ab")),
    "append to a string": ("appends", op("a") + b"K\1a"),
    "items of a list": ("sets items", b"]K\1K\1s"),
    "encoding": ("bytes are not a string", call("_codecs.encode", "ab", "utf-7")),
}


# Cases that take seconds run in one container only; other cases cover the rest.
SLOW = ("copies of pairs",)


@pytest.mark.parametrize(
    "container, name",
    [(c, name) for c in CONTAINERS for name in BOMBS if c == "plain" or name not in SLOW],
)
def test_bombs_and_broken_opcodes(name, container, load):
    message, opcodes = BOMBS[name]
    content = CONTAINERS[container](program(b"}", op("w"), opcodes, b"s"))
    with at_most(5e7), pytest.raises(UserError, match=message):
        load(content)


def test_a_memo_of_billions_costs_nothing(load):
    content = program(b"}r\xff\xff\xff\x7f")
    with at_most(1e6):
        assert load(content) == {}


def test_copies_stay_in_proportion(load):
    storages = {"0": bytes(4 * 10_000)}
    copy = tensor((100, 100), (1, 100), count=10_000)
    with pytest.raises(UserError, match="far more than its size"):
        load(zipped(program(b"(", copy * 500, b"t"), storages))
    view = tensor((100, 100), (100, 1), count=10_000)
    views = [view.replace(b"tQ", op(("1", 0, n)) + b"tQ") for n in range(500)]
    tensors = load(zipped(program(b"(", *views, b"t"), storages))
    assert all(np.shares_memory(tensors[0], other) for other in tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_every_cut_is_noticed(name, load):
    whole = (FILES / name).read_bytes()
    for size in range(0, len(whole), 1 if name == "stream.pth" else 3):
        with pytest.raises(UserError):
            load(whole[:size])


def test_other_files_are_refused(load, tmp_path):
    npz = io.BytesIO()
    np.savez(npz, a=np.ones(2))
    tar = bytes(257) + b"ustar" + bytes(1000)
    good, script = program(GOOD), {"code/a.py": b"a" * 1000, "constants.pkl": b"\x80\x02)."}
    for content, message in {
        b"": "is empty",
        b"<!DOCTYPE html><html>": "neither a PyTorch checkpoint nor a pickled dict",
        pickle.dumps([1]): "neither a PyTorch checkpoint nor a pickled dict",
        pickle.dumps({1: 2})[:-1]: "damaged or cut off",
        tar: "is a tar file",
        npz.getvalue(): "torch.save did not write it",
        zipped(good, {"0": FLOATS}, **script): "is a TorchScript archive",
        zipped(good, {"0": FLOATS}, zipfile.ZIP_DEFLATED, **script): "is a TorchScript archive",
        zipped(good, {"0": bytes(10**6)}, zipfile.ZIP_DEFLATED): "compressed",
        zipped(good, {"0": FLOATS}, byteorder=b"big"): "big-endian",
        zipped(good): "'data/0' is not in the archive",
        streamed(good, {"0": (4, FLOATS)}, little=False): "big-endian",
        streamed(good, {"0": (4, FLOATS)}, protocol=1002): "never written",
        streamed(good, {"0": (5, FLOATS)}): "cut off",
        streamed(good, {"0": (2, FLOATS)}): "wrong size",
        streamed(good, {"0": (4, FLOATS)}).replace(op(["0"]), op([["0"]])): "does not match",
        streamed(good, {"0": (4, FLOATS)}).replace(op(["0"]), op(["0", "0"])): "does not match",
        streamed(good, {"0": (-1, FLOATS)}): "cut off",
        streamed(good, {"0": (4, FLOATS), "1": (2**40, b"")}): "does not match",
        streamed(
            program(GOOD, tensor((2,), (1,), kind="torch.DoubleStorage"), b"\x86")
        ): "two types",
    }.items():
        with pytest.raises(UserError, match=message):
            load(content)
    with pytest.raises(UserError, match="is not a file"):
        pickles.read(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is not a file"):
        pickles.read(tmp_path)


def test_a_disk_that_fails(monkeypatch):
    def fail(*_, **__):
        raise OSError("no such device")

    monkeypatch.setattr(archive.mmap, "mmap", fail)
    with pytest.raises(UserError, match=r"zip.pth cannot be read: no such device\."):
        pickles.read(FILES / "zip.pth")


def test_lies_of_a_zip_archive(load):
    """Refuses wrong sizes, offsets and names in the central directory."""
    good = zipped(program(GOOD, tensor((4,), (1,), key="1"), b"\x86"), {"0": FLOATS, "1": FLOATS})
    assert len(load(good)) == 2
    entry = good.rindex(b"PK\1\2")  # of data/1
    [offset] = struct.unpack_from("<I", good, entry + 42)
    for position, value, message in [
        (entry + 42, good.index(b"PK\3\4", 10), "overlap"),  # data/1 at the offset of data/0
        (entry + 42, offset - 1, "overlap"),
        (entry + 42, offset + 1, "lists members that it does not contain"),
        (entry + 42, 2**31, "damaged or cut off"),
        (offset, 0, "lists members that it does not contain"),  # the signature of its header
        (entry + 20, 8, "overlap"),  # its compressed size
        (entry + 16, 1, "checksum of 'data/1'"),
        (entry + 8, 1, "encrypted"),
        (entry + 10, zipfile.ZIP_BZIP2, "compressed"),
    ]:
        lying = bytearray(good)
        struct.pack_into("<H" if position < entry + 16 else "<I", lying, position, value)
        with pytest.raises(UserError, match=message):
            load(bytes(lying))
    lying = bytearray(good)
    struct.pack_into("<II", lying, entry + 20, 2**30, 2**30)
    with pytest.raises(UserError, match="does not contain"):
        load(bytes(lying))
    struct.pack_into("<III", lying, entry + 16, 0, 16, 16)
    assert len(load(bytes(lying))) == 2  # torch.save can leave checksums out
    twice = good.replace(b"a/data/1", b"a/data/0")
    with pytest.raises(UserError, match="overlap"):
        load(twice)


def tried(content, path):
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        pickles.read(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bits_give_a_result_or_a_clear_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flipped.pth"
    name = data.draw(st.sampled_from(FORMATS))
    content = bytearray((FILES / name).read_bytes())
    inner = name == "zip.pth" and data.draw(st.booleans())
    if inner:  # flips bits of the pickle alone, under a correct checksum
        with zipfile.ZipFile(FILES / name) as archive:
            content = bytearray(archive.read("zip/data.pkl"))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    tried(
        zipped(bytes(content), {str(key): FLOATS for key in range(10)}) if inner else content, path
    )


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"", b"PK\3\4", b"\x80\2", b"\x80\4", b"\x80\2}("]),
    st.lists(
        st.binary(max_size=30)
        | st.sampled_from([*(opcodes for _, opcodes in BAD_TENSORS.values()), b"u.", b"}", b"("])
    ),
)
def test_random_bytes_give_a_result_or_a_clear_error(tmp_path_factory, magic, parts):
    tried(magic + b"".join(parts), tmp_path_factory.getbasetemp() / "random.pth")


WRITTEN = {
    **{key: value for key, value in STATE.items() if key != "transposed"},
    "float64": np.array([0.1]),
    "int32": np.array([[-(2**31)]], np.int32),
    "uint8": np.arange(256, dtype=np.uint8),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "big": np.arange(3, dtype=">f4"),
    "none": np.zeros((2, 0, 3), BFLOAT16),
}
EXTRA = {"epoch": 3, "best": 0.5, "arch": "rés", "cos": True, "none": None, "far": -(2**40)} | {
    "nested": {"steps": [1, 2.5, "a"], "betas": (0.9, 0.999)}
}


@pytest.mark.parametrize("extra", [None, EXTRA])
def test_what_is_written_is_read(tmp_path, extra):
    pickles.write(tmp_path / "a.pth", WRITTEN, extra)
    content = pickles.read(tmp_path / "a.pth")
    native = {key: value.astype(value.dtype.newbyteorder("=")) for key, value in WRITTEN.items()}
    equal(content if extra is None else content.pop("state_dict"), native)
    assert extra is None or content == extra
    file = io.BytesIO()
    pickles.write(file, WRITTEN, extra)
    raw = (tmp_path / "a.pth").read_bytes()
    assert file.getvalue() == raw
    assert raw.index(np.arange(256, dtype=np.uint8).tobytes()) % 64 == 0
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert all(info.date_time[0] == 1980 for info in archive.infolist())


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    for state, extra, message in [
        ({"w": np.ones(2, np.complex64)}, None, "w is of type complex64"),
        ({"w": np.array(["a"])}, None, "w is of type <U1"),
        ({"w": np.ones(2)}, {"args": object()}, "extra holds a object"),
    ]:
        with pytest.raises(UserError, match=message):
            pickles.write(tmp_path / "a.pth", state, extra)
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize("extra", [None, EXTRA])
def test_pytorch_reads_what_is_written(tmp_path, extra):
    torch = pytest.importorskip("torch")
    pickles.write(tmp_path / "a.pth", WRITTEN, extra)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    state = content if extra is None else content.pop("state_dict")
    assert extra is None or content == extra
    assert list(state) == list(WRITTEN)
    for key, value in state.items():
        expected = WRITTEN[key]
        assert tuple(value.shape) == expected.shape
        assert value.stride() == torch.empty(expected.shape).stride()
        assert str(value.dtype) == f"torch.{expected.dtype.newbyteorder('=').name}"
        np.testing.assert_array_equal(value.double().numpy(), expected.astype(np.float64))


@pytest.mark.parametrize("new", [True, False])
def test_what_pytorch_writes_is_read(tmp_path, new):
    torch = pytest.importorskip("torch")
    types = ["float64", "float32", "float16", "bfloat16", "complex64", "bool"]
    types += ["int64", "int32", "int16", "int8", "uint8", *(["uint16", "uint32"] if new else [])]
    base = torch.arange(24).reshape(2, 3, 4)
    state = {}
    for name in types:
        value = base.to(getattr(torch, name))
        state |= {
            name: value,
            f"{name}/T": value.permute(2, 0, 1),
            f"{name}/part": value[1, 1:, ::2],
        }
    marked = torch.nn.Parameter(torch.ones(2))
    marked.kind = "marked"
    state |= {"expanded": torch.ones(1, 3).expand(1, 3), "marked": marked, "numpy": np.arange(3)}
    scheduler = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([marked], 0.1), [1, 2])
    others = {"milestones": scheduler.state_dict()["milestones"], "top1": np.float32(0.5)}
    whole = {"criterion": torch.nn.CrossEntropyLoss(), "device": torch.device("cpu")}
    torch.save(
        {"state": state, **others, **whole}, tmp_path / "a.pth", _use_new_zipfile_serialization=new
    )
    content = pickles.read(tmp_path / "a.pth")
    for key, value in state.items():
        actual = content["state"][key]
        assert str(actual.dtype) == str(value.dtype).removeprefix("torch.")
        expected = np.array(value.tolist()).astype(actual.dtype)
        np.testing.assert_array_equal(actual, expected, err_msg=key)
    assert {key: content[key] for key in others} == others and content["device"] == "cpu"
    assert content["criterion"].name == "torch.nn.modules.loss.CrossEntropyLoss"
    torch.save(torch.ones(2).to_sparse(), tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match="unsupported kind"):
        pickles.read(tmp_path / "a.pth")
