"""Read a checkpoint file: safetensors, or a pickle of nothing but tensors and plain data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.pickles import unpickle, unpickle_outline
from vitarium.checkpoints.zips import check_zip

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
KINDS = ("safetensors", "zip", "pickle")
_MAGIC = (
    (b"PK\x03\x04", "zip"),
    (b"\x80", "pickle"),
    (b"\x1f\x8b", "a gzip archive, which is not unpacked"),
    (b"\xfd7zXZ", "an xz archive, which is not unpacked"),
    (b"7z\xbc\xaf", "a 7z archive, which is not unpacked"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
)


def read(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """What a checkpoint file holds: tensors by name, or a dictionary around them.

    The content decides, not the file's name. Pickles are read with ``weights_only=True`` and
    never otherwise, by torch 2.10 or newer; nothing in the file is run.

    Args:
        path: the file.
        mmap: whether the tensors of a zip checkpoint stay in the file, as safetensors' always
            do, and are paged in where they are used: little private memory is taken, and the
            file must stay as it is for as long as they live. torch's format before 1.6 cannot,
            nor a zip checkpoint named ``.safetensors``: these are read into memory.

    Returns:
        Tensors on the CPU, by name, or whatever dictionary was saved; `unwrap` finds the
        tensors in it.

    Raises:
        CheckpointError: no such file, neither safetensors nor a PyTorch checkpoint (web pages,
            JSON and archives are called that), truncated or damaged, or a pickle that asks for
            more than tensors and plain data.
    """
    path = Path(path)
    with _named(path):
        kind = check_structure(path)
        return load_file(path) if kind == "safetensors" else unpickle(path, kind == "zip", mmap)


def outline(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `read` would return, with tensors on the meta device: none is read.

    So a file can be unwrapped, converted and compared with a model before memory is taken for it
    (``compare(..., data=False)``).

    Returns:
        Tensors without data, by name, or whatever dictionary was saved around them.

    Raises:
        CheckpointError: as `read`, except that damaged tensors are not noticed.
    """
    path = Path(path)
    with _named(path):
        kind = check_structure(path, payload=False)
        return _header(path) if kind == "safetensors" else unpickle_outline(path, kind == "zip")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors that say which file they are about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def check_structure(path: Path, payload: bool = True) -> str:
    """Kind of a checkpoint file, ``safetensors``, ``zip`` or ``pickle``, after a look at its frame.

    A file cut short is found here in the first two kinds, and a flipped bit in the second; the
    third, torch's format before 1.6, has neither frame nor checksums.

    Args:
        path: the file.
        payload: whether to read a zip checkpoint's tensors too, for their checksums.

    Raises:
        CheckpointError: anything else, called what it is; the message lacks the path.
        OSError: the file cannot be read.
    """
    if path.is_dir():
        raise CheckpointError("expected a checkpoint file, got a folder")
    if not path.exists():
        raise CheckpointError("no such file")
    if not path.is_file():
        raise CheckpointError("expected a checkpoint file, got a device or a pipe")
    with path.open("rb") as file:
        kind = kind_of(file.read(512))
    if kind == "safetensors":
        _header(path)
    elif kind == "zip":
        check_zip(path, payload)
    elif kind not in KINDS:
        raise CheckpointError(f"expected safetensors or a PyTorch checkpoint, got {kind}")
    return kind


def kind_of(head: bytes) -> str:
    """What a file is by its first bytes: one of `KINDS`, or a description in words."""
    if not head:
        return "an empty file"
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        return "safetensors"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive, which is not unpacked"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        return "a web page (HTML or XML)"
    if text.startswith((b"{", b"[")):
        return "JSON, perhaps a server's error message"
    return "an unknown format"


def _header(path: Path) -> dict[str, Tensor]:
    """What a safetensors header describes, on the meta device, checked against the file's length.

    Raises:
        CheckpointError: a header that is damaged, or that does not describe exactly this many
            bytes; the message lacks the path.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(
                f"truncated or damaged: its header claims {length} bytes, the file has {size}"
            )
        text = file.read(length)
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise CheckpointError("damaged: its header is not a dictionary")
    entries.pop("__metadata__", None)
    tensors = {}
    spans = []
    for name, entry in entries.items():
        dtype, shape, (start, end) = _entry(name, entry)
        if math.prod(shape) * dtype.itemsize != end - start:
            raise CheckpointError(
                f"damaged: {name} is {shape} of {entry['dtype']} in {end - start} bytes"
            )
        tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
        spans.append((start, end))
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise CheckpointError("damaged: its tensors overlap or leave gaps")
        position = end
    if position != size - 8 - length:
        raise CheckpointError(
            f"truncated or damaged: its header promises {position} bytes of tensors, the file "
            f"has {size - 8 - length}"
        )
    return tensors


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], list[int]]:
    if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if (
            isinstance(dtype, str)
            and dtype in DTYPES
            and _sizes(shape)
            and _sizes(offsets)
            and len(offsets) == 2
            and math.prod(size or 1 for size in shape) < 2**63  # what torch can multiply
        ):
            return DTYPES[dtype], shape, offsets
    raise CheckpointError(f"damaged: its header describes {name} as {str(entry)[:100]}")


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
