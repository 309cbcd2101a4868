"""A machine that follows the opcodes of pickles and runs nothing of theirs.

A pickle is a program. The stdlib's unpickler runs it, and lets a hostile one take any amount of
memory or exhaust the stack even when it may call nothing. This machine knows containers, numbers,
strings, tensors and arrays, calls the functions of `disco_jax.convert.rebuild` only, and makes an
inert `Stub` of an object of any other class.
"""

import pickle
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from disco_jax.convert.archive import STORAGES, Refused, StorageId
from disco_jax.convert.rebuild import LATER, Global, Stub, atoms, fill, find, pairs
from disco_jax.convert.text import shown

_MOST_STUBS = 100_000  # whole models have some thousands; each costs time


class Machine:
    """Follows the opcodes of one pickle.

    Args:
      storage: gives a storage for its name.
      size: bytes of the file; what is copied in memory stays in proportion to it.
    """

    def __init__(self, storage: Callable[[StorageId], Any], size: int):
        self.storage = storage
        self._left = 4 * size + 2**20
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[Any, Any] = {}
        self._stubs = 0
        self.unfilled: dict[int, np.ndarray] = {}  # arrays of which only the class is known yet

    def spend(self, size: int) -> None:
        """Counts bytes or items that are copied."""
        self._left -= size
        if self._left < 0:
            raise Refused("unpacks to far more than its size.")

    def stub(self, name: str) -> Stub:
        """An object of a class that is not known."""
        self._stubs += 1
        if self._stubs > _MOST_STUBS:
            raise Refused(
                f"holds more than {_MOST_STUBS:,} objects of classes that are not known, such as "
                f"{shown(name)}: save the state_dict() of the model alone."
            )
        return Stub(name)

    def run(self, file: BinaryIO) -> Any:
        """The object of the pickle; the file is left behind it."""
        # One look-up an opcode: a file of a few megabytes can have millions of them.
        following, read = _FOLLOWING, file.read
        while (code := read(1)) != _STOP:
            if code not in following:
                raise ValueError(f"the opcode {code!r} is unknown" if code else "it does not end")
            argument, step = following[code]
            if argument is None:
                step(self)
            else:
                step(self, argument(file))
        if self.unfilled:
            raise Refused("is damaged: it has an array without content.")
        return self._stack.pop()

    def push(self, item: Any) -> None:
        self._stack.append(item)

    def put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def name(self, text: str) -> None:
        """The class or function of an opcode that has "module name" as its argument."""
        module, called = text.split(" ", 1)
        self._stack.append(find(module, called))

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop(self, count: int | None = None) -> list:
        """Takes the last `count` items off the stack, or those above the last mark."""
        start = self._marks.pop() if count is None else len(self._stack) - count
        if start < 0:
            raise IndexError("the stack is empty")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def collect(self, kind: Callable[[list], Any], count: int | None = None) -> None:
        self._stack.append(kind(self.pop(count)))

    def extend(self, count: int | None = None) -> None:
        items, target = self.pop(count), self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            target.update(atoms(items))
        elif type(target) is not Stub:
            raise Refused("is damaged: it appends to something that is no list.")

    def update(self, count: int | None = None) -> None:
        items, target = self.pop(count), self._stack[-1]
        if type(target) is dict:
            target.update(pairs(items))
        elif type(target) is not Stub:
            raise Refused("is damaged: it sets items of something that is no dict.")

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def named(self) -> None:
        module, called = self.pop(2)
        if type(module) is not str or type(called) is not str:
            raise Refused("is damaged: the name of a class is no text.")
        self._stack.append(find(module, called))

    def persistent(self) -> None:
        """An object that lies outside of the pickle: a storage, or a module with its source."""
        kind, *name = self._stack.pop()
        if kind == "module":
            self._stack.append(name[0])
            return
        storage, key, _, count, *view = name
        dtype = STORAGES.get(storage.name.split(".")[-1])
        view = tuple(view[0][1:]) if view and view[0] is not None else None
        if kind != "storage" or dtype is None or type(key) is not str:
            raise Refused(f"has a storage of an unknown kind, {shown(storage.name)}.")
        if any(type(number) is not int or number < 0 for number in (count, *(view or ()))):
            raise Refused(f"is damaged: storage {key!a} has no proper size.")
        self._stack.append(self.storage(StorageId(dtype, key, count, view)))

    def reduce(self, count: int = 2) -> None:
        function, arguments, *_ = self.pop(count)
        self._stack.append(self.call(function, arguments))

    def call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not Global or type(arguments) is not tuple:
            raise Refused(f"is damaged: it calls {shown(type(function).__name__)}.")
        return function.call(self, *arguments)

    def build(self) -> None:
        """Gives an object its state; attributes of dicts, tensors and the like are left out."""
        target, state = self._stack[-2], self._stack.pop()
        if id(target) in self.unfilled:
            fill(self, self.unfilled.pop(id(target)), *state[-4:])
        elif isinstance(target, np.dtype):
            if state[1] not in ("<", "|", "="):
                raise Refused("holds big-endian arrays, which are not supported.")
        elif type(target) is Stub:
            target.state = state
        elif not isinstance(target, dict | np.ndarray) and target is not LATER:
            raise Refused("is damaged: it gives a state to something that can have none.")


# Opcodes that put their argument on the stack, those that put something new there, and others.
_ARGUMENTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_STEPS: dict[str, Callable[..., Any]] = {
    "MARK": Machine.mark,
    "POP": lambda machine: machine.pop(1),
    "POP_MARK": Machine.pop,
    "TUPLE": lambda machine: machine.collect(tuple),
    "TUPLE1": lambda machine: machine.collect(tuple, 1),
    "TUPLE2": lambda machine: machine.collect(tuple, 2),
    "TUPLE3": lambda machine: machine.collect(tuple, 3),
    "LIST": lambda machine: machine.collect(list),
    "DICT": lambda machine: machine.collect(lambda items: dict(pairs(items))),
    "FROZENSET": lambda machine: machine.collect(lambda items: frozenset(atoms(items))),
    "APPEND": lambda machine: machine.extend(1),
    "APPENDS": Machine.extend,
    "ADDITEMS": Machine.extend,
    "SETITEM": lambda machine: machine.update(2),
    "SETITEMS": Machine.update,
    "MEMOIZE": Machine.memoize,
    "STACK_GLOBAL": Machine.named,
    "BINPERSID": Machine.persistent,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.reduce,
    "NEWOBJ_EX": lambda machine: machine.reduce(3),
    "BUILD": Machine.build,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine.get),
    "GLOBAL": Machine.name,
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
}


def _follow(name: str) -> Callable[..., Any]:
    """What the machine does at an opcode, called with its argument if it has one."""
    if name in _ARGUMENTS:
        return Machine.push
    if name in _CONSTANTS:
        return lambda machine: machine.push(_CONSTANTS[name]())
    return _STEPS.get(name) or _refuse(name)


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(machine: Machine, argument: Any = None) -> None:
        raise Refused(f"has the pickle opcode {name}, which no checkpoint has a use for.")

    return refuse


_STOP = pickle.STOP
# Opcode -> (what reads its argument, None if it has none; what the machine does).
_FOLLOWING: dict[bytes, tuple[Callable[[BinaryIO], Any] | None, Callable[..., Any]]] = {
    opcode.code.encode("latin-1"): (
        opcode.arg.reader if opcode.arg else None,
        _follow(opcode.name),
    )
    for opcode in pickletools.opcodes
}
