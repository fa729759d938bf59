"""Read a checkpoint that is a pickle: of nothing but tensors and plain data, and never run it."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from io import BytesIO
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, UntypedStorage
from torch.torch_version import TorchVersion

from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.zips import check_zip

_FIRST_SAFE_TORCH = "2.10"
_DEEPEST = 200  # Python's own pickler reaches a few hundred
_INSTRUCTIONS = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}

_lock = threading.Lock()


def unpickle(path: Path, zipped: bool, mmap: bool) -> dict[str, Any]:
    """What `read` returns of a checkpoint that `check_structure` has let pass.

    Raises:
        CheckpointError: the pickle asks for more than tensors and plain data, is damaged, or
            its tensors are not exactly what the file has bytes for; the message lacks the path.
    """
    # A tensor may be any part of its storage, but all the bytes of a file that torch.save wrote
    # belong to storages, each to one, and all tensors to these. torch itself leaves memory that
    # it is not told to fill as it finds it.
    storages: list[UntypedStorage] = []

    def keep(storage: UntypedStorage, location: str) -> UntypedStorage:
        storages.append(storage)
        return storage

    # torch.load would take a name with this ending for the other format.
    mmap = mmap and zipped and path.suffix != ".safetensors"
    expected = _payload(path, zipped)
    loaded = _load(path, map_location=keep, mmap=mmap)
    actual = sum(storage.nbytes() + (0 if zipped else 8) for storage in storages)
    if actual != expected:
        raise CheckpointError(
            f"damaged: its tensors take {actual} bytes, and the file has "
            f"{'an unknown number' if expected is None else expected} for them"
        )
    spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)
    for tensor in _tensors(loaded):
        if tensor.layout is torch.strided and tensor.numel() > 0:
            start = tensor.untyped_storage().data_ptr()
            index = bisect_right(spans, start, key=itemgetter(0)) - 1
            if index < 0 or start >= spans[index][1]:
                raise CheckpointError(
                    f"refused: it asks for a tensor of shape {list(tensor.shape)} that it "
                    f"does not hold"
                )
    return loaded


def _tensors(obj: Any) -> Iterator[Tensor]:
    """All the tensors in dictionaries and sequences, which may contain themselves."""
    left, seen = [obj], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)


def unpickle_outline(path: Path, zipped: bool) -> dict[str, Any]:
    """What `outline` returns, with the same errors as `unpickle` but for damaged tensors."""
    _payload(path, zipped)
    with torch.serialization.skip_data():
        return _load(path, map_location="meta", mmap=False)


def _load(path: Path, **options: Any) -> dict[str, Any]:
    if TorchVersion(torch.__version__) < _FIRST_SAFE_TORCH:
        raise CheckpointError(
            f"a pickle is read safely from torch {_FIRST_SAFE_TORCH} on, and this is torch "
            f"{torch.__version__}: upgrade torch, or convert the file to safetensors elsewhere"
        )
    try:
        # Training scripts save their arguments beside the weights: a bag of plain values.
        # The list of what may be unpickled is torch's, and one for all threads. An open file
        # where that will do, because torch.load would go by the ending of a name.
        with _lock, torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            source = path if options["mmap"] else file
            loaded = torch.load(source, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        # Without the cause, which advises to run what is refused.
        raise CheckpointError(_refusal(str(error))) from None
    except Exception as error:  # a damaged pickle can raise anything, and nothing of it is ours
        raise CheckpointError(
            f"truncated, damaged or not a PyTorch checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"expected a dictionary, got {type(loaded).__name__}")
    return loaded


def _refusal(message: str) -> str:
    """What torch's unpickler would not do, and what the user can."""
    called = re.search(r"GLOBAL ([\w.]+)", message)
    instruction = re.search(r"Unsupported operand ([0-9]+)", message)
    if called is not None:
        what = f"asks to run {called[1]}"
    elif instruction is not None and int(instruction[1]) in _INSTRUCTIONS:
        what = f"uses pickle's instruction {_INSTRUCTIONS[int(instruction[1])]}"
    else:
        return "damaged, or a pickle that asks for more than tensors and plain data"
    return (
        f"refused: it {what}, and only tensors and plain data are read; ask its authors for "
        f"safetensors, or convert it where running unknown code does no harm"
    )


def _payload(path: Path, zipped: bool) -> int | None:
    """Bytes that a file has for its storages; None where that cannot be told.

    Its pickles are looked at and not run. torch's format before 1.6 begins with five of them,
    and in it the size of a storage takes 8 bytes more.
    """
    try:
        if zipped:
            frame = check_zip(path, payload=False)
            with path.open("rb") as file:
                file.seek(frame.pickle_offset)
                _skip_pickle(BytesIO(file.read(frame.pickle_size)))
            return frame.payload_size
        with path.open("rb") as file:
            for _ in range(5):
                _skip_pickle(file)
            return path.stat().st_size - file.tell()
    except (IndexError, KeyError, OverflowError, ValueError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        return None  # so torch.load will fail too, and says why


def _skip_pickle(file: IO[bytes]) -> None:
    """Move behind a pickle, and refuse tuples so deep that hashing one overflows C's stack."""
    depths: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "MARK":
            marks.append(len(depths))
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = depths[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            depths.append(memo[argument])
        else:
            before = opcode.stack_before
            kept = len(depths)
            if pickletools.markobject in before:
                kept = marks.pop()
                before = before[: before.index(pickletools.markobject)]
            kept -= len(before)
            taken = depths[kept:]
            del depths[kept:]
            if opcode.name in _GROWING:
                depth = max(taken[0], 1 + max(taken[1:], default=0))
            else:
                depth = 1 + max(taken, default=0)
            if depth > _DEEPEST:
                raise CheckpointError(f"refused: its values are nested more than {_DEEPEST} deep")
            depths.extend([depth] * len(opcode.stack_after))
