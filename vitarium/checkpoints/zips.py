"""The frame of a zip checkpoint: every reader must find the same records, undamaged."""

from __future__ import annotations

import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vitarium.checkpoints.errors import CheckpointError

_LOCAL = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<4s3L"), struct.Struct("<4sL2Q")
_BEHIND = 8  # flag: checksum and sizes stand behind the data
_FLAGS = _BEHIND | 0x800  # and names in UTF-8
_FOLDER = 0x10  # DOS attribute
_MAX16, _MAX32 = 2**16 - 1, 2**32 - 1
_CHUNK = 1 << 20
# Others make torch end the process: of its own files, all have these.
_SETTINGS = {"byteorder": sys.byteorder.encode(), ".storage_alignment": b"[1-9][0-9]{0,8}"}


class Frame(NamedTuple):
    """Where the pickle is in a zip checkpoint, and how many bytes each of its storages has."""

    pickle_offset: int
    pickle_size: int
    tensors: dict[str, int]


def check_zip(path: Path, payload: bool = True) -> Frame:
    """Check that ``path`` is what ``torch.save`` writes, and whole.

    torch finds the records by another library than Python's ``zipfile`` and ignores checksums.
    What the two could read differently is refused: anything behind or before the archive, names
    that differ in case only, records that overlap, are folders, or are described otherwise by the
    directory than beside the data. A record whose checksum is 0 has none: so
    ``torch.serialization.set_crc32_options(False)`` and ``skip_data()`` leave it.

    Args:
        path: the file.
        payload: whether to check the checksums of the tensors too, which reads all of the file.

    Raises:
        CheckpointError: the file is damaged or something else; the message lacks the path.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"truncated or damaged: {error}") from error
    names = {record.orig_filename.lower() for record in records}
    leaves = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in leaves:
        raise CheckpointError("expected a state dict, got a TorchScript program, which is not run")
    if "data.pkl" not in leaves:
        raise CheckpointError("expected a PyTorch checkpoint, got another zip archive")
    root = records[0].orig_filename.partition("/")[0] + "/"
    members = {record.filename for record in records}
    if root + "data.pkl" not in members or not all(name.startswith(root) for name in members):
        raise CheckpointError("damaged: its records stand in several folders")
    if any(".." in re.split(r"[/\\]", name) for name in names):
        raise CheckpointError("damaged: the name of one of its records leads elsewhere")
    if len(names) != len(records) or any(x.filename != x.orig_filename for x in records):
        raise CheckpointError("damaged: two of its records have one name")
    pickle_offset = pickle_size = 0
    tensors: dict[str, int] = {}
    with path.open("rb") as file:
        position, end = 0, _directory(file, path.stat().st_size, len(records))
        for record in records:
            start = _data_offset(file, record)
            # torch.save never compresses: what is in the file is all that is read from it.
            if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & ~_FLAGS:
                raise CheckpointError(f"damaged: its record {record.filename} is packed")
            # torch would take a folder's size and leave the memory as it finds it.
            if record.filename.endswith("/") or record.external_attr & _FOLDER:
                raise CheckpointError(f"damaged: its record {record.filename} is a folder")
            if record.header_offset < position or start + record.file_size > end:
                raise CheckpointError("damaged: its records claim more bytes than the file has")
            if not _sizes_agree(file, record, start):
                raise CheckpointError(f"damaged: its record {record.filename} has two sizes")
            position = start + record.file_size
            name = record.filename.removeprefix(root)
            tensor = name.startswith("data/")
            if tensor:
                tensors[name.removeprefix("data/")] = record.file_size
            elif name == "data.pkl":
                pickle_offset, pickle_size = start, record.file_size
            elif name.lower() in _SETTINGS:  # torch does not tell cases apart
                file.seek(start)
                expected, value = _SETTINGS[name.lower()], file.read(min(record.file_size, 99))
                if re.fullmatch(expected, value) is None:
                    raise CheckpointError(
                        f"refused: its record {record.filename} is {value!r}, for which torch "
                        f"cannot outline it: expected {expected.decode()}"
                    )
            if record.CRC != 0 and (payload or not tensor):
                _check_crc(file, record, start)
    return Frame(pickle_offset, pickle_size, tensors)


def _directory(file: BinaryIO, size: int, count: int) -> int:
    """Where the directory begins, which must fill the file from there to its end record."""
    file.seek(max(0, size - _END64.size - _LOCATOR64.size - _END.size))
    tail = file.read()
    end = size - _END.size
    signature, *disks, entries, length, start, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\5\6" or comment != 0:
        raise CheckpointError("damaged: it goes on behind its end")
    found = (*disks, entries, length, start)
    locator = tail[-_END.size - _LOCATOR64.size : -_END.size]
    if locator.startswith(b"PK\6\7"):  # a second end record with larger fields, as torch writes
        end -= _LOCATOR64.size + _END64.size
        signature, *_, entries, length, start = _END64.unpack(tail[: _END64.size])
        if signature != b"PK\6\6" or _LOCATOR64.unpack(locator)[2] != end:
            raise CheckpointError("damaged: its end record is not where it should be")
    fits = min(count, _MAX16), min(length, _MAX32), min(start, _MAX32)
    if found != (0, 0, fits[0], *fits) or entries != count or start + length != end:
        raise CheckpointError("damaged: its directory is not where it should be")
    return int(start)


def _data_offset(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    file.seek(record.header_offset)
    header = file.read(_LOCAL.size)
    if len(header) == _LOCAL.size:
        signature, *_, name, extra = _LOCAL.unpack(header)
        encoding = "utf-8" if record.flag_bits & 0x800 else "cp437"
        if signature == b"PK\3\4" and file.read(name) == record.orig_filename.encode(encoding):
            return int(record.header_offset + _LOCAL.size + name + extra)
    raise CheckpointError(f"damaged: the header of its record {record.filename} is another's")


def _sizes_agree(file: BinaryIO, record: zipfile.ZipInfo, start: int) -> bool:
    """Whether a record's checksum and sizes are the same in the directory and beside its data."""
    expected = (record.CRC, record.file_size, record.file_size)
    if record.file_size != record.compress_size:
        return False
    if record.file_size == 0:
        return True
    if record.flag_bits & _BEHIND:
        file.seek(start + record.file_size)
        tail = file.read(_DESCRIPTOR64.size)
        return (b"PK\7\10", *expected) in (
            _DESCRIPTOR.unpack_from(tail),
            _DESCRIPTOR64.unpack(tail),
        )
    file.seek(record.header_offset)
    return _LOCAL.unpack(file.read(_LOCAL.size))[6:9] in (
        expected,
        (record.CRC, _MAX32, _MAX32),  # both stand among the extra fields
    )


def _check_crc(file: BinaryIO, record: zipfile.ZipInfo, start: int) -> None:
    file.seek(start)
    checksum, left = 0, record.file_size
    while left > 0 and (chunk := file.read(min(left, _CHUNK))):
        checksum = zlib.crc32(chunk, checksum)
        left -= len(chunk)
    if left > 0 or checksum != record.CRC:
        raise CheckpointError(
            f"damaged: its record {record.filename} does not have the bytes that were written "
            f"(CRC-32 {record.CRC:08x} expected, {checksum:08x} found)"
        )
