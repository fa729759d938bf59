"""Read a checkpoint that is a pickle: of nothing but tensors and plain data, and never run it."""

from __future__ import annotations

import argparse
import mmap
import pickle
import threading
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import UntypedStorage
from torch.torch_version import TorchVersion

from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.opcodes import DAMAGED, scan
from vitarium.checkpoints.zips import check_zip

_FIRST_SAFE_TORCH = "2.10"

_lock = threading.Lock()


def unpickle(path: Path, zipped: bool, mapped: bool) -> dict[str, Any]:
    """What `read` returns of a checkpoint that `check_structure` has let pass.

    Raises:
        CheckpointError: the pickle asks for more than tensors and plain data, is damaged, or
            its tensors are not exactly what the file has bytes for; the message lacks the path.
    """

    def keep(storage: UntypedStorage, location: str) -> UntypedStorage:
        return storage

    # torch.load would take a name with this ending for the other format.
    mapped = mapped and zipped and path.suffix != ".safetensors"
    _check(path, zipped)
    return _load(path, map_location=keep, mmap=mapped)


def unpickle_outline(path: Path, zipped: bool) -> dict[str, Any]:
    """What `outline` returns, with the same errors as `unpickle` but for damaged tensors."""
    _check(path, zipped)
    with torch.serialization.skip_data():
        return _load(path, map_location="meta", mmap=False)


def _check(path: Path, zipped: bool) -> None:
    """Refuse what is not plain, or whose storages are not all that is in the file, each once.

    A tensor may be any part of its storage, but all the bytes of a file that torch.save wrote
    belong to storages. torch itself leaves memory that it is not told to fill as it finds it.
    """
    with path.open("rb") as file:
        if zipped:
            frame = check_zip(path, payload=False)
            file.seek(frame.pickle_offset)
            storages = scan(BytesIO(file.read(frame.pickle_size))).storages
            held = sum(frame.tensors.values())
            whole = storages == frame.tensors
        else:  # torch's format before 1.6: five pickles, then the storages with their sizes
            # Read through a map, which gives no more than there is, whatever a string claims.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                *_, main, keys = (scan(cast(IO[bytes], view)) for _ in range(5))
                held = view.size() - view.tell()
            storages = {key: 8 + size for key, size in main.storages.items()}
            whole = keys.lists(storages)
    needed = sum(storages.values())
    if needed != held:
        raise CheckpointError(
            f"truncated or damaged: its tensors take {needed} bytes, and the file has {held} for "
            f"them"
        )
    if not whole:
        raise CheckpointError("damaged: its tensors are not those that the file has bytes for")


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
    except pickle.UnpicklingError:
        raise CheckpointError(DAMAGED) from None  # the cause advises to run what is refused
    except Exception as error:  # a damaged pickle can raise anything, and nothing of it is ours
        raise CheckpointError(
            f"truncated, damaged or not a PyTorch checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"expected a dictionary, got {type(loaded).__name__}")
    return loaded
