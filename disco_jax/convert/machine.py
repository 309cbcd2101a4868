"""Interprets the opcodes of pickles without running code from a file.

A pickle is a program. The standard library's unpickler runs it, and a hostile pickle can use any
amount of memory or exhaust the stack even if it may call nothing. This machine knows containers,
numbers, strings, tensors and arrays, calls only the functions of `disco_jax.convert.rebuild`, and
represents an object of any other class by an inert `Stub`.
"""

import pickle
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from disco_jax.convert.archive import STORAGES, Refused, StorageId
from disco_jax.convert.rebuild import DEFERRED, Global, Stub, atoms, fill, find, pairs
from disco_jax.convert.text import shown

_MAX_STUBS = 100_000  # whole models have a few thousand; each costs time


class Machine:
    """Interprets the opcodes of one pickle.

    Args:
      storage: returns the storage for an identifier.
      size: bytes of the file; bounds what may be copied in memory.
    """

    def __init__(self, storage: Callable[[StorageId], Any], size: int):
        self.storage = storage
        self._budget = 4 * size + 2**20
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[Any, Any] = {}
        self._stubs = 0
        self.unfilled: dict[int, np.ndarray] = {}  # arrays whose content follows

    def spend(self, size: int) -> None:
        """Counts copied bytes or items; refuses more than 4 times the file's size plus 2^20."""
        self._budget -= size
        if self._budget < 0:
            raise Refused("unpacks to far more than its size.")

    def stub(self, name: str) -> Stub:
        """Returns a `Stub` for an object of an unknown class; limits their number."""
        self._stubs += 1
        if self._stubs > _MAX_STUBS:
            raise Refused(
                f"holds more than {_MAX_STUBS:,} objects of unknown classes, such as "
                f"{shown(name)}: save model.state_dict() alone."
            )
        return Stub(name)

    def run(self, file: BinaryIO) -> Any:
        """Returns the object of a pickle and leaves the file positioned behind the pickle."""
        # One look-up per opcode: a file of a few megabytes can hold millions of opcodes.
        steps, read = _OPCODES, file.read
        while (code := read(1)) != _STOP:
            if code not in steps:
                raise ValueError(f"the opcode {code!r} is unknown" if code else "it does not end")
            argument, step = steps[code]
            if argument is None:
                step(self)
            else:
                step(self, argument(file))
        if self.unfilled:
            raise Refused("is damaged: it holds an array without content.")
        return self._stack.pop()

    def push(self, item: Any) -> None:
        self._stack.append(item)

    def put(self, slot: int) -> None:
        self._memo[slot] = self._stack[-1]

    def get(self, slot: int) -> None:
        self._stack.append(self._memo[slot])

    def name(self, text: str) -> None:
        """Pushes the class or function named by the opcode's argument, "module name"."""
        module, name = text.split(" ", 1)
        self._stack.append(find(module, name))

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop(self, count: int | None = None) -> list:
        """Removes and returns the last `count` items of the stack, or those above the last mark."""
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
            raise Refused("is damaged: it appends to an object that is not a list.")

    def update(self, count: int | None = None) -> None:
        items, target = self.pop(count), self._stack[-1]
        if type(target) is dict:
            target.update(pairs(items))
        elif type(target) is not Stub:
            raise Refused("is damaged: it sets items of an object that is not a dict.")

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def named(self) -> None:
        module, name = self.pop(2)
        if type(module) is not str or type(name) is not str:
            raise Refused("is damaged: the name of a class is not a string.")
        self._stack.append(find(module, name))

    def persistent(self) -> None:
        """Pushes an object stored outside the pickle: a storage, or a module with its source."""
        kind, *fields = self._stack.pop()
        if kind == "module":
            self._stack.append(fields[0])
            return
        storage, key, _, count, *view = fields
        dtype = STORAGES.get(storage.name.split(".")[-1])
        view = tuple(view[0][1:]) if view and view[0] is not None else None
        if kind != "storage" or dtype is None or type(key) is not str:
            raise Refused(f"holds a storage of unknown type, {shown(storage.name)}.")
        if any(type(number) is not int or number < 0 for number in (count, *(view or ()))):
            raise Refused(f"is damaged: storage {key!a} has an invalid size.")
        self._stack.append(self.storage(StorageId(dtype, key, count, view)))

    def reduce(self, count: int = 2) -> None:
        function, arguments, *_ = self.pop(count)
        self._stack.append(self.call(function, arguments))

    def call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not Global or type(arguments) is not tuple:
            raise Refused(f"is damaged: it calls {shown(type(function).__name__)}.")
        return function.call(self, *arguments)

    def build(self) -> None:
        """Gives an object its state; ignores attributes of dicts, tensors and the like."""
        target, state = self._stack[-2], self._stack.pop()
        if id(target) in self.unfilled:
            fill(self, self.unfilled.pop(id(target)), *state[-4:])
        elif isinstance(target, np.dtype):
            if state[1] not in ("<", "|", "="):
                raise Refused("holds big-endian arrays, which are not supported.")
        elif type(target) is Stub:
            target.state = state
        elif not isinstance(target, dict | np.ndarray) and target is not DEFERRED:
            raise Refused("is damaged: it gives a state to an object that cannot have one.")


# Opcodes that push their argument, opcodes that push a new object, and all others.
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


def _step(name: str) -> Callable[..., Any]:
    """Returns the step for an opcode; it is called with the opcode's argument if there is one."""
    if name in _ARGUMENTS:
        return Machine.push
    if name in _CONSTANTS:
        return lambda machine: machine.push(_CONSTANTS[name]())
    return _STEPS.get(name) or _refuse(name)


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(machine: Machine, argument: Any = None) -> None:
        raise Refused(f"uses the pickle opcode {name}, which no checkpoint needs.")

    return refuse


_STOP = pickle.STOP
# Opcode -> (reader of its argument or None, step of the machine).
_OPCODES: dict[bytes, tuple[Callable[[BinaryIO], Any] | None, Callable[..., Any]]] = {
    opcode.code.encode("latin-1"): (
        opcode.arg.reader if opcode.arg else None,
        _step(opcode.name),
    )
    for opcode in pickletools.opcodes
}
