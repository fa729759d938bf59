"""What a pickle would make, found out without running it, and refused unless it is plain."""

from __future__ import annotations

import pickletools
from collections.abc import Iterable
from typing import IO, Any, NamedTuple, NoReturn

import torch
from torch.serialization import StorageType

from vitarium.checkpoints.errors import CheckpointError

# torch's own list of what may be called is longer, grows by what other packages add, and is not
# made against calls that never end, take all memory, or give a tensor attributes of a file's
# choice. These are what torch.save writes of dense tensors and plain data.
_TENSORS = {
    "torch._utils._rebuild_tensor": "BINPERSID",  # the instruction that made the first argument
    "torch._utils._rebuild_tensor_v2": "BINPERSID",
    "torch._utils._rebuild_tensor_v3": "BINPERSID",
    "torch._utils._rebuild_parameter": "REDUCE",
}
_DATA = {
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
}
# What torch's unpickler knows.
_INSTRUCTIONS = {
    *("APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPERSID"),
    *("BINPUT", "BINUNICODE", "BUILD", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE"),
    *("GLOBAL", "LONG1", "LONG_BINGET", "LONG_BINPUT", "MARK", "NEWFALSE", "NEWOBJ", "NEWTRUE"),
    *("NONE", "PROTO", "REDUCE", "SETITEM", "SETITEMS", "SHORT_BINSTRING", "STOP"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}
DAMAGED = "damaged, or a pickle that asks for more than tensors and plain data"
_GROWING = {"APPEND", "APPENDS", "BUILD", "SETITEM", "SETITEMS"}
_DEEPEST = 200  # Python's own pickler reaches a few hundred
_LONGEST = 10**7  # characters, or ten times the pickle's length


class _Value(list[Any]):
    """Something that a pickle makes: of which constants and values, and by which instruction."""

    __slots__ = ("made_by",)

    def __init__(self, made_by: str, parts: Iterable[Any] = ()) -> None:
        super().__init__(parts)
        self.made_by = made_by


class _Global(str):
    """A constant that is imported, by its path."""


class Scanned(NamedTuple):
    """A pickle that is plain: what it makes, and the bytes of its storages by their keys."""

    value: Any
    storages: dict[str, int]

    def lists(self, keys: Iterable[str]) -> bool:
        """Whether this is a list of strings, each of ``keys`` once."""
        if not _made_by(self.value, "EMPTY_LIST"):
            return False
        return all(type(x) is str for x in self.value) and sorted(self.value) == sorted(keys)


def scan(file: IO[bytes]) -> Scanned:
    """Move behind a pickle, and find out what `torch.load` would make of it.

    Raises:
        CheckpointError: something other than dense tensors and plain data, or values that are
            nested or repeated so often that hashing or printing them would never end or overflow
            C's stack; the message lacks the path.
    """
    try:
        return _scan(file)
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"truncated, damaged or not a PyTorch checkpoint ({type(error).__name__})"
        ) from error


def _scan(file: IO[bytes]) -> Scanned:
    start = file.tell()
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    storages: dict[str, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name not in _INSTRUCTIONS:
            _refuse(f"uses pickle's instruction {name}")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_imported(argument))
        elif not opcode.stack_before:
            if opcode.stack_after:
                stack.append(_Value(name) if argument is None else argument)
        elif name != "STOP":
            before, kept = opcode.stack_before, len(stack)
            if pickletools.markobject in before:
                kept = marks.pop()
                before = before[: before.index(pickletools.markobject)]
            kept -= len(before)
            if kept < 0:
                raise IndexError
            value = _Value(name, stack[kept:])
            _check(value, storages)
            if name in _GROWING:
                parts, value = value[1:], value[0]
                value.extend(parts)
            stack[kept:] = [value]
    _check_extent(_Value("", stack), file.tell() - start)
    return Scanned(stack[-1], storages)


def _imported(argument: Any) -> _Global:
    path = argument.replace(" ", ".").replace("__builtin__.", "builtins.")
    dtype = vars(torch).get(path.removeprefix("torch."))
    known = path in _TENSORS or path in _DATA or isinstance(dtype, torch.dtype)
    if not (known or _item_size(path)):
        _refuse(f"asks to run {path}")
    return _Global(path)


def _item_size(path: str) -> int | None:
    """Bytes of one element of a class of storages."""
    if path == "torch.storage.UntypedStorage":
        return 1
    try:
        return StorageType(path.removeprefix("torch.")).dtype.itemsize
    except KeyError:
        return None


def _check(value: _Value, storages: dict[str, int]) -> None:
    """Refuse a value, just made, that torch.save would not write; note storages."""
    if value.made_by in ("REDUCE", "NEWOBJ"):
        plain = _is_call(*value)
    elif value.made_by == "BUILD":
        plain = _is_state(*value)
    elif value.made_by == "BINPERSID":
        plain = _is_storage(value[0], storages)
    else:
        plain = value.made_by not in _GROWING or isinstance(value[0], _Value)
    if not plain:
        raise CheckpointError(DAMAGED)


def _is_call(function: Any, arguments: Any) -> bool:
    if not isinstance(function, _Global) or not _made_by(arguments, "TUPLE"):
        return False
    if function in _TENSORS:
        return bool(arguments) and _made_by(arguments[0], _TENSORS[function])
    if function == "_codecs.encode":
        return _is_text(arguments)
    if function == "builtins.bytearray":
        if len(arguments) == 1 and _made_by(arguments[0], "REDUCE"):
            return bool(arguments[0][0] == "_codecs.encode")
        return not arguments or _is_text(arguments)
    # Whatever goes through a tensor makes one of each of its elements, and it may claim any number.
    parts = [*arguments, *(x for part in arguments if isinstance(part, _Value) for x in part)]
    return function in _DATA and not any(
        _made_by(x, "REDUCE", "NEWOBJ", "BINPERSID") for x in parts
    )


def _is_text(arguments: _Value) -> bool:
    """Whether these are bytes as torch.save writes them; other encodings can multiply them."""
    return type(arguments[0]) is str and arguments[1:] in (["latin1"], ["latin-1"])


def _is_state(obj: Any, state: Any) -> bool:
    """Whether attributes are such as these classes have, and hide no methods."""
    if not (_made_by(obj, "REDUCE", "NEWOBJ") and _made_by(state, "EMPTY_DICT")):
        return False
    if obj[0] == "collections.OrderedDict":
        return state[::2] == ["_metadata"]
    return obj[0] == "argparse.Namespace" and not any(
        type(name) is not str or name.startswith("__") for name in state[::2]
    )


def _is_storage(name: Any, storages: dict[str, int]) -> bool:
    """Whether a persistent name is that of a storage, of one size throughout."""
    if not _made_by(name, "TUPLE"):
        return False
    tag, kind, key, location, count, *view = name  # views are what torch 0.3 had
    if tag != "storage" or [type(x) for x in (kind, key, location, count)] != [
        *(_Global, str, str, int)
    ]:
        return False
    size = _item_size(kind)
    if size is None or count < 0 or not all(_made_by(x, "NONE") for x in view):
        return False
    return storages.setdefault(key, size * count) == size * count


def _made_by(value: Any, *instructions: str) -> bool:
    if not isinstance(value, _Value):
        return False
    made_by = value.made_by
    if made_by in ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        made_by = "TUPLE"
    return made_by in instructions


def _check_extent(root: _Value, length: int) -> None:
    """Refuse values that go too deep, or that are too many if each is counted wherever it is."""
    done: dict[int, tuple[int, int]] = {}  # depth and characters
    entered: set[int] = set()
    path = [root]
    while path:
        value = path[-1]
        parts = [part for part in value if isinstance(part, _Value)]
        if id(value) not in entered:
            entered.add(id(value))
            left = [part for part in parts if id(part) not in done]
            if any(id(part) in entered for part in left):
                raise CheckpointError("refused: a value contains itself")
            path += left
            continue
        path.pop()
        if id(value) in done:
            continue
        depth = 1 + max((done[id(part)][0] for part in parts), default=0)
        size = 1 + sum(done[id(part)][1] for part in parts)
        size += sum(len(part) if type(part) is str else 1 for part in value)
        if depth > _DEEPEST:
            raise CheckpointError(f"refused: its values are nested more than {_DEEPEST} deep")
        if size > max(_LONGEST, 10 * length):
            raise CheckpointError("refused: its values are repeated too often")
        done[id(value)] = depth, size


def _refuse(what: str) -> NoReturn:
    """Say what a pickle would do, and what the user can."""
    raise CheckpointError(
        f"refused: it {what}, and only tensors and plain data are read; ask its authors for "
        f"safetensors, or convert it where running unknown code does no harm"
    )
