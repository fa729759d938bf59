"""Write converted checkpoints: tensors, and beside them a card that tells where they are from."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import vitarium
from vitarium.backbones._registry import entries, released
from vitarium.checkpoints.conversion import DETECTOR, NONE_STATED, Conversion
from vitarium.checkpoints.disk import digest, rename, sync
from vitarium.checkpoints.weights import Weight

CARD_FORMAT = "vitarium-conversion/1"


def check_files(
    source: str | os.PathLike[str], out: str | os.PathLike[str], to: str = "ours"
) -> None:
    """Whether `write` may write there; nothing is read or written but an existing card.

    Raises:
        ValueError: a suffix other than ``.safetensors`` (or ``.pth``, for another layout than
            ours), ``out`` is ``source``, or another file than its card stands where that goes.
        OSError: no such folder, or a folder in place of a file.
    """
    out = Path(out)
    suffixes = (".safetensors",) if to == "ours" else (".safetensors", ".pth")
    if out.suffix not in suffixes:
        raise ValueError(f"out: expected a name that ends with {' or '.join(suffixes)}, got {out}")
    card = card_path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(out.parent))
    if out.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", str(out))
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise ValueError(f"out: expected another file than the checkpoint itself, got {out}")
    if card.exists() and not (card.is_file() and _is_card(card, out.name)):
        raise ValueError(f"out: {card}, where the card goes, exists and is not that of {out.name}")


def write(
    conversion: Conversion, source: str | os.PathLike[str], out: str | os.PathLike[str]
) -> dict[str, Any]:
    """Write a conversion: tensors, and beside them a card of the same name that ends in .json.

    Both go to temporary names in the same folder and are renamed when they are complete and
    synced; until then existing files stay as they are.

    Args:
        conversion: what to write.
        source: the file that it comes from.
        out: a name that ends with ``.safetensors``; or, for another layout than ours, ``.pth``,
            where the authors' has the wrapper that the registry states.

    Returns:
        The card.

    Raises:
        CheckpointError: the conversion has a fault.
        ValueError: as `check_files`.
        OSError: it cannot be written.
    """
    conversion.require_fit()
    source, out = Path(source), Path(out)
    check_files(source, out, conversion.to)
    pickled = out.suffix == ".pth"
    tensors = _separate(conversion.tensors, whole=pickled)
    needed, free = sum(x.nbytes for x in tensors.values()), shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"needs {needed:,} bytes, and {free:,} are left", str(out.parent)
        )
    sha256 = digest(source)
    tag = conversion.tag or _tag_of(conversion.entry, sha256)
    wrapper = _wrapper(conversion, tag) if pickled else None
    around = [] if wrapper is None else [wrapper]
    if conversion.to == "authors" and conversion.task is not None and conversion.head is None:
        around.append(DETECTOR)
    with _replacing(card_path(out)) as card_part, _replacing(out) as part:
        try:
            if pickled:
                with part.open("wb") as file:  # by its name torch would call what is inside
                    torch.save(tensors if wrapper is None else {wrapper: tensors}, file)
            else:
                save_file(tensors, part, {"format": "pt", "source_sha256": sha256})
                _order_metadata(part)
        except (SafetensorError, RuntimeError) as error:
            # On a full disk torch complains of what follows from it.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{out}: cannot be written: {cause}") from error
        sync(part)
        card = {
            "format": CARD_FORMAT,
            "entry": conversion.entry,
            "tag": tag,
            "task": conversion.task,
            "head": conversion.head,
            "to": conversion.to,
            "img_size": conversion.img_size,
            "source": _described(source.name, source, sha256) | {"wrapper": conversion.wrapper},
            "output": _described(out.name, part, digest(part)) | {"wrapper": around},
            "tensors": len(tensors),
            "parameters": conversion.num_parameters,
            **conversion.changes(),
            "licence": _licence(conversion, tag),
            "versions": {
                "vitarium": vitarium.__version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "safetensors": safetensors.__version__,
                "python": platform.python_version(),
            },
        }
        card_part.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(card_part, part)  # safetensors lets nobody else read
        sync(card_part)
    return card


def card_path(out: Path) -> Path:
    """Where the card of a converted file is."""
    return out.with_suffix(".json")


def _is_card(path: Path, of: str) -> bool:
    try:
        card = json.loads(path.read_bytes())
        return bool(card["format"] == CARD_FORMAT and card["output"]["file"] == of)
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder; it becomes ``path`` at the end, or is removed."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        rename(part, path)
    finally:
        part.unlink(missing_ok=True)


def _order_metadata(path: Path) -> None:
    """Give the metadata of a safetensors file, which come in any order, one: same bytes each time.

    Compact JSON of the same entries has the same length.
    """
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def _described(name: str, path: Path, sha256: str) -> dict[str, Any]:
    return {"file": name, "size": path.stat().st_size, "sha256": sha256}


def _tag_of(entry: str, sha256: str) -> str | None:
    """The tag of the released file with this hash."""
    for name, weight in released(entry).items():
        if weight.sha256 == sha256:
            return name.partition(".")[2]
    return None


def _licence(conversion: Conversion, tag: str | None) -> dict[str, Any]:
    """What the registry states, and for which files: all of a kind, where the tag is not known."""
    entry, task = conversion.entry, conversion.task
    whole = conversion.head is not None or DETECTOR in conversion.wrapper
    kind = task if task is not None and whole else "cls"
    stated = {
        name: weight
        for name, weight in released(entry).items()
        if (weight.task == kind if tag is None else name == f"{entry}.{tag}")
    }
    code = getattr(entries()[entry], "_CODE_LICENCE", NONE_STATED)
    return {
        "code": " or ".join(sorted({x.code_licence or code for x in stated.values()})) or code,
        "weights": " or ".join(sorted({x.licence for x in stated.values()})) or NONE_STATED,
        "stated_for": list(stated),
    }


def _wrapper(conversion: Conversion, tag: str | None) -> str | None:
    """The key under which the authors' files hold tensors, or None for none."""
    if conversion.to == "transformers":
        return None
    if conversion.task is not None:
        return "state_dict"
    weights = released(conversion.entry)
    of_tag = weights.get(f"{conversion.entry}.{tag}")
    family: Mapping[str, Weight] = getattr(entries()[conversion.entry], "_WEIGHTS", {})
    known = [of_tag] if of_tag is not None else [*weights.values(), *family.values()]
    stated = [x.wrapper for x in known if x.task == "cls" and x.wrapper not in (None, "plain")]
    return stated[0] if stated else None


def _separate(tensors: Mapping[str, Tensor], whole: bool) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, copied only where they must be.

    Args:
        tensors: by name.
        whole: whether each must fill its storage, all of which a pickle would hold.
    """
    found = {name: x.contiguous() for name, x in tensors.items()}
    end = 0
    for name in sorted(found, key=lambda name: found[name].data_ptr()):
        x = found[name]
        if x.nbytes and (
            x.data_ptr() < end or (whole and x.untyped_storage().nbytes() != x.nbytes)
        ):
            found[name] = x.clone()
        end = max(end, x.data_ptr() + x.nbytes)
    return found
