"""Resolves the names in the pickle of a checkpoint to this package's functions or to a `Stub`.

The functions take the machine that interprets the pickle, which limits how much they may copy,
before the arguments from the file.
"""

import functools
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from disco_jax.convert.archive import DTYPES, STORAGES, Refused, are_sizes, tensor
from disco_jax.convert.text import shown

DEFERRED = object()  # replaces storages and tensors while only the storages' types are collected
_SIMPLE = re.compile(r"[biufc?SU]\d*")  # dtypes of numbers and of strings
_MAX_NAME = 300  # characters
_CLASS = re.compile("[A-Z][A-Za-z0-9_]*")
# Packages whose classes may do more than hold values; they are allowed by name only.
_KNOWN_PACKAGES = frozenset({*sys.stdlib_module_names, "torch", "numpy"})
# Element types of PyTorch that need a scale to be interpreted, or that NumPy lacks.
_UNSUPPORTED = re.compile(
    r"float[48]_\w+|u?int[1-7]|qu?int\d\w*|complex32|bits\d\w*|QU?Int\w*Storage"
)


class Stub:
    """An object of an unknown class: its name and, if the file has one, its state.

    A class that the file stores as a value is a Stub too.
    """

    __slots__ = ("name", "state")

    def __init__(self, name: str, state: Any = None):
        self.name = name
        self.state = state

    def __repr__(self):
        return f"<Stub {self.name}>"


class Global(Stub):
    """A class or function named in a file; `call` is this package's replacement for it."""

    __slots__ = ("call",)

    def __init__(self, name: str, call: Callable | None = None):
        super().__init__(name)
        self.call = call or (lambda machine, *args: machine.stub(name))


# Types allowed as keys and in sets: hashing nested tuples can take exponential time.
_ATOMS = (str, bytes, int, float, complex, bool, type(None), np.generic, Stub)


@functools.lru_cache(maxsize=4096)  # a file may name the class of each of its objects
def find(module: str, name: str) -> Any:
    """Resolves the name of a class or function in a pickle; equal names give the same object.

    Raises:
      Refused: the name is neither known nor a class whose objects can be left inert.
    """
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    if len(module) + len(name) > _MAX_NAME:
        raise Refused(f"is damaged: it has a name of more than {_MAX_NAME} characters.")
    full = f"{module.replace('numpy.core.', 'numpy._core.')}.{name}"
    full = _PYTHON2_NAMES.get(full, full)
    if full in _CALLS or full in _NAMES:
        return Global(full, _CALLS.get(full))
    if module == "torch" and name in DTYPES:
        return full
    third_party = module.partition(".")[0] not in _KNOWN_PACKAGES
    if _CLASS.fullmatch(name) and (third_party or module.startswith(_INERT)):
        return Global(full)
    if module in ("torch", "torch.cuda") and _UNSUPPORTED.fullmatch(name):
        raise Refused(
            f"holds numbers of the type {full}, which is not supported: save the weights as "
            "float32, float16 or bfloat16."
        )
    if full.startswith("torch._utils._rebuild"):
        raise Refused(f"holds a tensor of an unsupported kind ({shown(full)}).")
    raise Refused(
        f"asks to run {shown(full)}: nothing was run; do not trust the file. If you saved the "
        "model yourself, save model.state_dict() instead."
    )


def atoms(items: Iterable) -> list:
    """Returns the items as a list; refuses items that may not be keys."""
    items = list(items)
    for item in items:
        if type(item) is not str and not all(isinstance(part, _ATOMS) for part in _parts(item)):
            raise Refused("is damaged: it uses a container as a key.")
    return items


def _parts(item: Any) -> tuple:
    return item if type(item) is tuple else (item,)


def pairs(items: Sequence) -> Iterable[tuple]:
    """Returns the pairs of [key, value, key, value, ...]."""
    return zip(atoms(items[::2]), items[1::2], strict=True)


def _mapping(machine: Any, items: Any = ()) -> dict:
    machine.spend(len(items))
    flat = itertools.chain.from_iterable(items.items() if type(items) is dict else items)
    return dict(pairs(list(flat)))


def _collection(kind: type) -> Callable:
    def gather(machine, items=()):
        if type(items) not in (list, tuple, set, frozenset):
            raise Refused(f"is damaged: it makes a {kind.__name__} from another type.")
        machine.spend(len(items))
        return kind(atoms(items) if kind in (set, frozenset) else items)

    return gather


def _number(kind: type) -> Callable:
    def convert(machine, *arguments):
        if any(type(argument) not in (int, float, bool) for argument in arguments):
            raise Refused("is damaged: it makes a number from another type.")
        return kind(*arguments)

    return convert


def _bytes(machine: Any, text: str = "", encoding: str = "latin1") -> bytes:
    """Returns the bytes that Python 2 pickles store as a latin-1 string."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("is damaged: its bytes are not a string.")
    machine.spend(len(text))
    return text.encode("latin1")


def _device(machine: Any, kind: str, index: int | None = None) -> str:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise Refused("is damaged: a device has an invalid name.")
    name = kind if index is None else f"{kind}:{index}"
    machine.spend(len(name))
    return name


def _tensor(machine: Any, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
    if storage is DEFERRED:
        return DEFERRED
    return tensor(storage, offset, size, stride, machine.spend)


def _typed_tensor(
    machine: Any, storage: Any, offset: int, size: Any, stride: Any, *rest: Any
) -> Any:
    """Returns a tensor of a type without a storage class.

    The last arguments are requires_grad, hooks, dtype, ...
    """
    if storage is DEFERRED:
        return DEFERRED
    dtype = DTYPES[rest[2].removeprefix("torch.")]
    elements = storage[: len(storage) // dtype.itemsize * dtype.itemsize].view(dtype)
    return tensor(elements, offset, size, stride, machine.spend)


def _parameter(machine: Any, data: Any, *_: Any) -> Any:
    if data is not DEFERRED and not isinstance(data, np.ndarray):
        raise Refused("is damaged: a parameter holds no tensor.")
    return data


def _subclassed(machine: Any, function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """Returns a tensor that has attributes or an own class, without either."""
    return machine.call(function, arguments)


def _dtype(machine: Any, name: str, *_: Any) -> np.dtype:
    if not _SIMPLE.fullmatch(name) or not np.dtype(name).itemsize:
        raise Refused(
            f"holds an array of the type {shown(name)}; only numbers and strings are supported."
        )
    return np.dtype(name)


def _unfilled(machine: Any, *_: Any) -> np.ndarray:
    """Returns an array whose shape, type and content `fill` sets later."""
    array = np.empty(0)
    machine.unfilled[id(array)] = array
    return array


def _raw(machine: Any, shape: Any, dtype: np.dtype, raw: Any) -> bytes:
    """Returns the bytes of an array of this shape; Python 2 stores them as a string."""
    raw = _bytes(machine, raw) if type(raw) is str else raw
    if type(raw) not in (bytes, bytearray) or not isinstance(dtype, np.dtype):
        raise Refused("is damaged: an array has no bytes.")
    if type(shape) is not tuple or not are_sizes(shape):
        raise Refused("is damaged: an array has an invalid shape.")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise Refused(f"is damaged: an array of shape {shape} has {len(raw)} bytes.")
    machine.spend(len(raw))
    return raw


def fill(machine: Any, array: np.ndarray, shape: Any, dtype: Any, fortran: Any, raw: Any):
    """Sets shape, type and content of an array that `_unfilled` returned."""
    raw = _raw(machine, shape, dtype, raw)
    # NumPy's type stubs require np.bool; pickles hold Python's bool, which works too.
    array.__setstate__((1, shape, dtype, bool(fortran), bytes(raw)))  # type: ignore[arg-type]


def _from_buffer(
    machine: Any, raw: Any, dtype: Any, shape: Any, order: Literal["C", "F"]
) -> np.ndarray:
    raw = _raw(machine, shape, dtype, raw)
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _scalar(machine: Any, dtype: Any, raw: Any) -> np.generic:
    return np.frombuffer(_raw(machine, (), dtype, raw), dtype)[0]


# Names that checkpoints call -> this module's functions.
_CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _bytes,
    "builtins.bool": _number(bool),
    "builtins.bytes": lambda machine: b"",
    "builtins.complex": _number(complex),
    "builtins.dict": _mapping,
    "builtins.float": _number(float),
    "builtins.frozenset": _collection(frozenset),
    "builtins.int": _number(int),
    "builtins.list": _collection(list),
    "builtins.set": _collection(set),
    "builtins.tuple": _collection(tuple),
    "collections.Counter": _mapping,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda machine, factory=None, *items: _mapping(machine, *items),
    "copyreg._reconstructor": lambda machine, kind, base, state: machine.stub(kind.name),
    "numpy._core.multiarray._reconstruct": _unfilled,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "numpy.dtype": _dtype,
    "torch.Size": _collection(tuple),
    "torch._tensor._rebuild_from_type_v2": _subclassed,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch.device": _device,
    "torch.nn.parameter.Parameter": _parameter,
}
# Names that are allowed as values.
_NAMES = {
    *("argparse.Namespace", "builtins.object", "builtins.str", "numpy.ndarray", "typing.Any"),
    *(f"numpy.{name}" for name in (*DTYPES, "bool_")),
    *(f"{module}.{name}" for module in ("torch", "torch.cuda") for name in STORAGES),
    "torch.storage.UntypedStorage",
}
# Python 2's names.
_PYTHON2_NAMES = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
# PyTorch's modules of classes whose objects occur in checkpoints but are not weights.
_INERT = ("torch.nn.modules.", "torch.nn.parallel.", "torch.optim.")
