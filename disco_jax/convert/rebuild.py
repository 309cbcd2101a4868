"""What the pickle of a checkpoint may name, and what is made of it: our own functions, or a `Stub`.

The functions take the machine that follows the pickle, which limits what they may copy, before the
arguments that the file gives.
"""

import functools
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from disco_jax.convert.archive import DTYPES, STORAGES, Refused, proper, tensor
from disco_jax.convert.text import shown

LATER = object()  # instead of a storage or tensor, while only the types of storages are wanted
_SIMPLE = re.compile(r"[biufc?SU]\d*")  # dtypes of numbers and of strings
_LONGEST = 300  # of names, in characters
_CLASS = re.compile("[A-Z][A-Za-z0-9_]*")
# Packages whose classes may do more than hold values.
_KNOWN_PACKAGES = frozenset({*sys.stdlib_module_names, "torch", "numpy"})
# Element types of PyTorch whose numbers mean nothing without a scale, or that NumPy does not have.
_UNREAD = re.compile(r"float[48]_\w+|u?int[1-7]|qu?int\d\w*|complex32|bits\d\w*|QU?Int\w*Storage")


class Stub:
    """An object of a class that we don't know: its name and, if the file has one, its state.

    The class itself, where the file names it as a value, is a Stub too.
    """

    __slots__ = ("name", "state")

    def __init__(self, name: str, state: Any = None):
        self.name = name
        self.state = state

    def __repr__(self):
        return f"<Stub {self.name}>"


class Global(Stub):
    """What the file calls a class or a function; `call` is ours and makes what it would make."""

    __slots__ = ("call",)

    def __init__(self, name: str, call: Callable | None = None):
        super().__init__(name)
        self.call = call or (lambda machine, *args: machine.stub(name))


# What may be a key of a dict or in a set: hashing nested tuples can take forever.
_ATOMS = (str, bytes, int, float, complex, bool, type(None), np.generic, Stub)


@functools.lru_cache(maxsize=4096)  # a file may name a class for each of its objects
def find(module: str, name: str) -> Any:
    """What a pickle means by the name of a class or function; equal names give the same object.

    Raises:
      Refused: for what is neither known nor an object of a class that can be left alone.
    """
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    if len(module) + len(name) > _LONGEST:
        raise Refused(f"is damaged: it has a name of more than {_LONGEST} characters.")
    full = f"{module.replace('numpy.core.', 'numpy._core.')}.{name}"
    full = _OLD_NAMES.get(full, full)
    if full in _CALLS or full in _NAMES:
        return Global(full, _CALLS.get(full))
    if module == "torch" and name in DTYPES:
        return full
    foreign = module.partition(".")[0] not in _KNOWN_PACKAGES
    if _CLASS.fullmatch(name) and (foreign or module.startswith(_INERT)):
        return Global(full)
    if module in ("torch", "torch.cuda") and _UNREAD.fullmatch(name):
        raise Refused(
            f"holds numbers of the type {full}, which are not read: save the weights as float32, "
            "float16 or bfloat16."
        )
    if full.startswith("torch._utils._rebuild"):
        raise Refused(f"holds a tensor of a kind that is not supported ({shown(full)}).")
    raise Refused(
        f"wants to run {shown(full)}: nothing was run, and the file should not be trusted. Of a "
        "model that you made yourself, save model.state_dict() instead."
    )


def atoms(items: Iterable) -> list:
    """The same items, which can be keys."""
    items = list(items)
    for item in items:
        if type(item) is not str and not all(isinstance(part, _ATOMS) for part in _parts(item)):
            raise Refused("is damaged: it uses a container as a key.")
    return items


def _parts(item: Any) -> tuple:
    return item if type(item) is tuple else (item,)


def pairs(items: Sequence) -> Iterable[tuple]:
    """Pairs of [key, value, key, value, ...]."""
    return zip(atoms(items[::2]), items[1::2], strict=True)


def _mapping(machine: Any, items: Any = ()) -> dict:
    machine.spend(len(items))
    flat = itertools.chain.from_iterable(items.items() if type(items) is dict else items)
    return dict(pairs(list(flat)))


def _gathered(kind: type) -> Callable:
    def gather(machine, items=()):
        if type(items) not in (list, tuple, set, frozenset):
            raise Refused(f"is damaged: it makes a {kind.__name__} of something else.")
        machine.spend(len(items))
        return kind(atoms(items) if kind in (set, frozenset) else items)

    return gather


def _number(kind: type) -> Callable:
    def convert(machine, *arguments):
        if any(type(argument) not in (int, float, bool) for argument in arguments):
            raise Refused("is damaged: it makes a number of something else.")
        return kind(*arguments)

    return convert


def _bytes(machine: Any, text: str = "", encoding: str = "latin1") -> bytes:
    """What Python 2 pickles write instead of bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("is damaged: its bytes are not a string.")
    machine.spend(len(text))
    return text.encode("latin1")


def _device(machine: Any, kind: str, index: int | None = None) -> str:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise Refused("is damaged: a device has no proper name.")
    name = kind if index is None else f"{kind}:{index}"
    machine.spend(len(name))
    return name


def _tensor(machine: Any, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
    if storage is LATER:
        return LATER
    return tensor(storage, offset, size, stride, machine.spend)


def _typed_tensor(
    machine: Any, storage: Any, offset: int, size: Any, stride: Any, *rest: Any
) -> Any:
    """A tensor of a type that has no class of storages: (requires_grad, hooks, dtype, ...)."""
    if storage is LATER:
        return LATER
    dtype = DTYPES[rest[2].removeprefix("torch.")]
    whole = storage[: len(storage) // dtype.itemsize * dtype.itemsize].view(dtype)
    return tensor(whole, offset, size, stride, machine.spend)


def _parameter(machine: Any, data: Any, *_: Any) -> Any:
    if data is not LATER and not isinstance(data, np.ndarray):
        raise Refused("is damaged: a parameter holds no tensor.")
    return data


def _subclassed(machine: Any, function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor with attributes, or of a class of its own."""
    return machine.call(function, arguments)


def _dtype(machine: Any, name: str, *_: Any) -> np.dtype:
    if not _SIMPLE.fullmatch(name) or not np.dtype(name).itemsize:
        raise Refused(f"holds an array of the type {shown(name)}, not of numbers or strings.")
    return np.dtype(name)


def _unfilled(machine: Any, *_: Any) -> np.ndarray:
    """An array that gets its shape, type and content later, by `fill`."""
    array = np.empty(0)
    machine.unfilled[id(array)] = array
    return array


def _raw(machine: Any, shape: Any, dtype: np.dtype, raw: Any) -> bytes:
    """The bytes of an array of that shape; Python 2 has them as a string."""
    raw = _bytes(machine, raw) if type(raw) is str else raw
    if type(raw) not in (bytes, bytearray) or not isinstance(dtype, np.dtype):
        raise Refused("is damaged: an array has no bytes.")
    if type(shape) is not tuple or not proper(shape):
        raise Refused("is damaged: an array has no proper shape.")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise Refused(f"is damaged: an array of shape {shape} has {len(raw)} bytes.")
    machine.spend(len(raw))
    return raw


def fill(machine: Any, array: np.ndarray, shape: Any, dtype: Any, fortran: Any, raw: Any):
    """Gives an array that `_unfilled` made its shape, type and content."""
    raw = _raw(machine, shape, dtype, raw)
    # NumPy's stubs ask for its own bool here; what pickles hold, and it takes, is Python's.
    array.__setstate__((1, shape, dtype, bool(fortran), bytes(raw)))  # type: ignore[arg-type]


def _from_buffer(
    machine: Any, raw: Any, dtype: Any, shape: Any, order: Literal["C", "F"]
) -> np.ndarray:
    raw = _raw(machine, shape, dtype, raw)
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _scalar(machine: Any, dtype: Any, raw: Any) -> np.generic:
    return np.frombuffer(_raw(machine, (), dtype, raw), dtype)[0]


# Our functions for the names that files have reason to call.
_CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _bytes,
    "builtins.bool": _number(bool),
    "builtins.bytes": lambda machine: b"",
    "builtins.complex": _number(complex),
    "builtins.dict": _mapping,
    "builtins.float": _number(float),
    "builtins.frozenset": _gathered(frozenset),
    "builtins.int": _number(int),
    "builtins.list": _gathered(list),
    "builtins.set": _gathered(set),
    "builtins.tuple": _gathered(tuple),
    "collections.Counter": _mapping,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda machine, factory=None, *items: _mapping(machine, *items),
    "copyreg._reconstructor": lambda machine, kind, base, state: machine.stub(kind.name),
    "numpy._core.multiarray._reconstruct": _unfilled,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "numpy.dtype": _dtype,
    "torch.Size": _gathered(tuple),
    "torch._tensor._rebuild_from_type_v2": _subclassed,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch.device": _device,
    "torch.nn.parameter.Parameter": _parameter,
}
# Names that stand for themselves.
_NAMES = {
    *("argparse.Namespace", "builtins.object", "builtins.str", "numpy.ndarray", "typing.Any"),
    *(f"numpy.{name}" for name in (*DTYPES, "bool_")),
    *(f"{module}.{name}" for module in ("torch", "torch.cuda") for name in STORAGES),
    "torch.storage.UntypedStorage",
}
# What Python 2 calls them.
_OLD_NAMES = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
# Where PyTorch has classes whose objects are stored in checkpoints, but are no weights.
_INERT = ("torch.nn.modules.", "torch.nn.parallel.", "torch.optim.")
