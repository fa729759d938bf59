"""Read a checkpoint file: safetensors, or a pickle of nothing but tensors and plain data."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import threading
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.torch_version import TorchVersion

from vitarium.checkpoints.errors import CheckpointError

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_FIRST_SAFE_TORCH = "2.10"
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

_lock = threading.Lock()


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
    try:
        kind = check_structure(path)
        if kind == "safetensors":
            return load_file(path)
        return _unpickle(path, mmap and kind == "zip")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def check_structure(path: Path) -> str:
    """Kind of a checkpoint file, ``safetensors``, ``zip`` or ``pickle``, after a look at its frame.

    Reads headers only. A file cut short is found here in the first two kinds; the third, torch's
    format before 1.6, has no frame.

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
    size = path.stat().st_size
    with path.open("rb") as file:
        kind = kind_of(file.read(512))
    if kind == "safetensors":
        read_header(path)
    elif kind == "zip":
        _check_zip(path, size)
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


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes in a safetensors file, checked against its length.

    Returns:
        name -> (the format's dtype, shape). No tensor is read.

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
        entries = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise CheckpointError("damaged: its header is not a dictionary")
    entries.pop("__metadata__", None)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans = []
    for name, entry in entries.items():
        dtype, shape, (start, end) = _entry(name, entry)
        if math.prod(shape) * _BITS[dtype] // 8 != end - start:
            raise CheckpointError(
                f"damaged: {name} is {list(shape)} of {dtype} in {end - start} bytes"
            )
        tensors[name] = (dtype, shape)
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


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if (
            isinstance(dtype, str)
            and dtype in _BITS
            and _sizes(shape)
            and _sizes(offsets)
            and len(offsets) == 2
        ):
            return dtype, tuple(shape), (offsets[0], offsets[1])
    raise CheckpointError(f"damaged: its header describes {name} as {str(entry)[:100]}")


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"truncated or damaged: {error}") from error
    names = {member.filename.rpartition("/")[2] for member in members}
    if "constants.pkl" in names:
        raise CheckpointError("expected a state dict, got a TorchScript program, which is not run")
    if "data.pkl" not in names:
        raise CheckpointError("expected a PyTorch checkpoint, got another zip archive")
    # torch.save never compresses, so this is also what keeps a small file from filling memory.
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or size < sum(
        member.file_size for member in members
    ):
        raise CheckpointError("damaged: its entries claim more bytes than the file has")


def _unpickle(path: Path, mmap: bool) -> dict[str, Any]:
    if TorchVersion(torch.__version__) < _FIRST_SAFE_TORCH:
        raise CheckpointError(
            f"a pickle is read safely from torch {_FIRST_SAFE_TORCH} on, and this is torch "
            f"{torch.__version__}: upgrade torch, or convert the file to safetensors elsewhere"
        )
    try:
        # Training scripts save their arguments beside the weights: a bag of plain values.
        # The list of what may be unpickled is torch's, and one for all threads.
        with _lock, torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            # torch.load would take a name with this ending for the other format.
            if mmap and path.suffix != ".safetensors":
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # a damaged pickle can raise anything, and nothing of it is ours
        refused = re.findall(r"GLOBAL ([\w.]+) ", str(error))
        if refused:
            raise CheckpointError(
                f"refused: it asks to run {', '.join(refused)}, and only tensors and plain data "
                f"are read; ask its authors for safetensors, or convert it where running "
                f"unknown code does no harm"
            ) from error
        raise CheckpointError(
            f"truncated, damaged or not a PyTorch checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"expected a dictionary, got {type(loaded).__name__}")
    return loaded
