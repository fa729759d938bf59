"""Damage small checkpoints in many ways, load each file, and judge what came of it.

    python tests/checkpoint_mutations.py --count 2000 [--seed 0]

Every file goes, in a process of its own kind that may die, through `fetch` with the sha256 of the
undamaged file known, through `read` and through `load`. The judge does not ask the reader what is
wrong with a file. It knows, from the making of each one, which tensors may come out of it:

- those of the undamaged file, exactly;
- where the format has no checksum (safetensors, torch's format before 1.6, and zips written
  without), for each tensor also the bytes that the damaged file has in its place: no reader could
  notice these;
- where two tensors of one shape and type changed names, these exchanged;
- none at all, where the mutation says so: hostile pickles, other files, tensors that are missing,
  too many, of another shape or kind, or that share memory.

Wrong is: any other tensors, a file accepted although its hash is known, an exception other than
`CheckpointError`, a model that changed although its file was refused, `read` and `load` that
disagree, code of the file that ran (it leaves a trace), a process that died, and one that took
longer than 20 seconds or wanted more than 2 GiB, whatever it said then. The program prints a table
by kind of mutation, names what went wrong, and ends with 1 if anything did.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import multiprocessing
import os
import pickle
import pickletools
import random
import resource
import struct
import sys
import tarfile
import tempfile
import threading
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from vitarium.checkpoints import CheckpointError, Renames, Weight, fetch, load, read

SECONDS = 20
BYTES = 2 << 30

TABLE = Renames([("layers.{i}.", "stages.{i}."), ("fc.weight", "head.weight")])


class Net(nn.Module):
    """Several shapes, two layers alike, and a counter; the authors call the stages layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.stages = nn.ModuleList(nn.Linear(6, 6, bias=i == 0) for i in range(2))
        self.head = nn.Linear(6, 4, bias=False)


def checkpoint_filter_fn(state_dict, model):
    return TABLE.to_ours(state_dict, model)


State = dict[str, torch.Tensor]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def written(state: State) -> dict[str, bytes]:
    """What a model holds, or should hold, by our names."""
    return {TABLE.ours(name): raw(tensor) for name, tensor in state.items()}


def authors_state(seed: int) -> State:
    """Random in every tensor, so that each one's bytes stand in a file once."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else torch.randint(1 << 40, tensor.shape, generator=generator)
        for name, tensor in TABLE.to_authors(Net().state_dict()).items()
    }


def zipped(obj: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def unverified(obj: object) -> bytes:
    torch.serialization.set_crc32_options(False)
    try:
        return zipped(obj)
    finally:
        torch.serialization.set_crc32_options(True)


def legacy(obj: object) -> bytes:
    """torch names storages by their addresses and sorts them: here they are named as they come."""
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    *head, main, keys = pickles_of(data)
    types: dict[str, object] = {}
    memo, last = {}, None
    for opcode, argument, _ in pickletools.genops(main):
        if opcode.name == "BINPUT":
            memo[argument] = last
        elif opcode.name == "BINGET":
            last = memo[argument]
        else:
            if opcode.name == "BINUNICODE" and argument.isdecimal():
                types.setdefault(argument, last)
            last = argument
    position, storages = len(b"".join([*head, main, keys])), {}
    for key in sorted(types):
        end = position + 8 + ITEM_SIZES[types[key]] * int.from_bytes(data[position:][:8], "little")
        storages[key], position = data[position:end], end
    assert position == len(data)
    names = {key: str(10**13 + number) for number, key in enumerate(types)}
    for key, name in names.items():
        main = main.replace(text(key), text(name))
    listed = b"\x80\x02](" + b"".join(map(text, names.values())) + b"e."
    return b"".join([*head, main, listed, *(storages[key] for key in names)])


ITEM_SIZES = {
    f"torch {name}Storage": size
    for name, size in {"Float": 4, "Long": 8, "ComplexFloat": 8, "Bool": 1}.items()
}


def pickles_of(data: bytes) -> list[bytes]:
    """The five with which a file of the old format begins."""
    file, ends = io.BytesIO(data), [0]
    for _ in range(5):
        for _ in pickletools.genops(file):
            pass
        ends.append(file.tell())
    return [data[start:end] for start, end in itertools.pairwise(ends)]


WRITERS: dict[str, Callable[..., bytes]] = {
    "safetensors": save,
    "zip": zipped,
    "zip without CRC": unverified,
    "legacy": legacy,
}


@dataclass(frozen=True)
class Base:
    """An undamaged file."""

    kind: str
    wrapped: bool

    @functools.cached_property
    def state(self) -> State:
        return authors_state(len(self.kind) + self.wrapped)

    def write(self, state: State) -> bytes:
        obj = {"model": state, "epoch": 7, "args": argparse.Namespace(lr=0.1)}
        return WRITERS[self.kind](obj if self.wrapped else state)

    @functools.cached_property
    def data(self) -> bytes:
        return self.write(self.state)

    @functools.cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Where each tensor's bytes are in the file, by our names."""
        found = {}
        for name, content in written(self.state).items():
            assert self.data.count(content) == 1
            start = self.data.index(content)
            found[name] = (start, start + len(content))
        return found


BASES = [
    Base(kind, wrapped)
    for kind in WRITERS
    for wrapped in (False, True)
    if not (wrapped and kind == "safetensors")
]


@dataclass(frozen=True)
class Mutation:
    """A damaged file, and what may be loaded from it beside the undamaged tensors."""

    kind: str
    base: Base
    data: bytes
    refuse: bool = False
    others: list[State] = field(default_factory=list)

    def allows(self, loaded: dict[str, bytes]) -> bool:
        if self.refuse:
            return False
        original = written(self.base.state)
        if loaded in (original, *(written(other) for other in self.others)):
            return True
        if self.base.kind == "zip" or loaded.keys() != original.keys():
            return False
        in_place = {name: self.data[slice(*span)] for name, span in self.base.spans.items()}
        return all(content in (original[n], in_place[n]) for n, content in loaded.items())


def flipped(rng: random.Random, base: Base, positions: list[int]) -> Mutation:
    data = bytearray(base.data)
    for position in positions:
        data[position] ^= 1 << rng.randrange(8)
    return Mutation("", base, bytes(data))


def bit_flip(rng: random.Random, base: Base) -> Mutation:
    count = rng.choice([1, 1, 1, 2, 3, 8])
    return flipped(rng, base, [rng.randrange(len(base.data)) for _ in range(count)])


def bit_flip_beside_tensors(rng: random.Random, base: Base) -> Mutation:
    inside = {i for span in base.spans.values() for i in range(*span)}
    outside = [i for i in range(len(base.data)) if i not in inside]
    return flipped(rng, base, [rng.choice(outside)])


def byte_replaced(rng: random.Random, base: Base) -> Mutation:
    data = bytearray(base.data)
    data[rng.randrange(len(data))] = rng.choice([0, 1, 0x2E, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return Mutation("", base, bytes(data))


def truncation(rng: random.Random, base: Base) -> Mutation:
    length = rng.choice([rng.randrange(len(base.data)), len(base.data) - rng.randint(1, 64)])
    return Mutation("", base, base.data[:length], refuse=True)


def extension(rng: random.Random, base: Base) -> Mutation:
    tail = rng.choice([b"\0", bytes(64), b"PK\5\6" + bytes(18), rng.randbytes(30), base.data])
    return Mutation("", base, base.data + tail, refuse=True)


def prefix(rng: random.Random, base: Base) -> Mutation:
    head = rng.choice([b"\0", base.data[:4], base.data[:64], b"\x80\x02}.", rng.randbytes(8)])
    return Mutation("", base, head + base.data, refuse=True)


def block(rng: random.Random, base: Base) -> tuple[int, int]:
    start = rng.randrange(len(base.data))
    return start, min(len(base.data), start + rng.choice([1, 4, 8, 16, 64, 256, 1024]))


def zeroed_block(rng: random.Random, base: Base) -> Mutation:
    start, end = block(rng, base)
    return Mutation("", base, base.data[:start] + bytes(end - start) + base.data[end:])


def copied_block(rng: random.Random, base: Base) -> Mutation:
    """A block overwritten by one of the same file or of another."""
    start, end = block(rng, base)
    source = rng.choice([base, base, rng.choice(BASES)]).data * 2
    other = rng.randrange(len(source) // 2)
    part = source[other : other + end - start]
    return Mutation("", base, base.data[:start] + part + base.data[start + len(part) :])


def inserted_block(rng: random.Random, base: Base) -> Mutation:
    start, end = block(rng, base)
    at = rng.choice([start, end, rng.randrange(len(base.data))])
    return Mutation("", base, base.data[:at] + base.data[start:end] + base.data[at:])


def removed_block(rng: random.Random, base: Base) -> Mutation:
    start, end = block(rng, base)
    return Mutation("", base, base.data[:start] + base.data[end:])


def exchanged_blocks(rng: random.Random, base: Base) -> Mutation:
    size = rng.choice([1, 4, 16, 24, 64])
    a, b = sorted(rng.sample(range(0, len(base.data) - size, 4), 2))
    b = max(b, a + size)
    data = base.data
    parts = (data[:a], data[b : b + size], data[a + size : b], data[a : a + size], data[b + size :])
    return Mutation("", base, b"".join(parts))


def swapped_names(rng: random.Random, base: Base) -> Mutation:
    a, b = rng.sample(list(base.state), 2)
    state = {**base.state, a: base.state[b], b: base.state[a]}
    alike = all(getattr(state[a], of) == getattr(state[b], of) for of in ("shape", "dtype"))
    state = {name: tensor.clone() for name, tensor in state.items()}
    return Mutation("", base, base.write(state), refuse=not alike, others=[state])


def other_tensors(rng: random.Random, base: Base) -> Mutation:
    """Written as it should be, but not what the model has."""
    state = dict(base.state)
    name = rng.choice(list(state))
    tensor = state[name]
    shape = list(tensor.shape) or [1]
    spoiled: dict[str, torch.Tensor | None] = {
        "missing": None,
        "longer": torch.zeros([shape[0] + 1, *shape[1:]]),
        "flat": torch.zeros(tensor.numel() + (tensor.ndim == 1)),
        "one more axis": tensor[None].clone(),
        "empty": torch.zeros(0),
        "other kind": torch.zeros(tensor.shape, dtype=torch.complex64),
        "integers": torch.zeros(tensor.shape, dtype=torch.bool),
        "shared": torch.zeros(1).expand(tensor.shape) if tensor.numel() > 1 else None,
        "huge": torch.zeros(1).expand(1 << 20, 1 << 20),
        "huge of its name": torch.zeros(()).expand(*shape, 1 << 30),
        "overlapping": torch.zeros(99).as_strided([2, 3], [1, 1]),
        "sparse": torch.zeros(4, 4).to_sparse(),
        "no data": torch.zeros(tensor.shape, device="meta"),
    }
    how = rng.choice(list(spoiled))
    value = spoiled[how]
    if base.kind == "safetensors" and value is not None:
        fits = how not in ("shared", "huge", "huge of its name", "sparse", "no data")
        value = value.contiguous() if fits else None
    if value is None:
        del state[name]
    elif rng.random() < 0.3:
        state[name + rng.choice(["_", ".x", "\0", "\N{SNOWMAN}"])] = value
    elif how == "integers" and not tensor.is_floating_point():
        state["more"] = value
    else:
        state[name] = value
    return Mutation("", base, base.write(state), refuse=True)


def header_edit(rng: random.Random, base: Base) -> Mutation:
    """The JSON in front of a safetensors file, edited as text or as a dictionary."""
    length = int.from_bytes(base.data[:8], "little")
    text, payload = base.data[8 : 8 + length], base.data[8 + length :]
    header = json.loads(text)
    header.pop("__metadata__", None)
    unedited = json.dumps(header).encode()
    name, other = rng.sample(list(header), 2)
    entry = header[name]
    big = rng.choice([2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30])
    odd = rng.choice([-1, 1.5, 1e3, True, None, "4", [], {}, big, 0])
    edits: dict[str, Callable[[], object]] = {
        "dtype": lambda: entry.update(dtype=rng.choice(["F16", "F64", "I32", "U8", "F4", "", odd])),
        "shape": lambda: entry.update(
            shape=rng.choice([[], [0], [big], [0, big, big], [odd], odd])
        ),
        "axis": lambda: entry.update(shape=[*entry["shape"], rng.choice([1, 2, 0, odd])]),
        "turned": lambda: entry.update(shape=[*entry["shape"][1:], *entry["shape"][:1], 1]),
        "offset": lambda: entry["data_offsets"].__setitem__(rng.randrange(2), odd),
        "shift": lambda: entry.update(data_offsets=[x + 4 for x in entry["data_offsets"]]),
        "alias": lambda: entry.update(data_offsets=header[other]["data_offsets"]),
        "field": lambda: entry.update(extra=odd),
        "less": lambda: entry.pop(rng.choice(list(entry))),
        "entry": lambda: header.update({name: odd}),
        "extra": lambda: header.update({"x": {**entry, "shape": [0], "data_offsets": [0, 0]}}),
        "name": lambda: header.update({rng.choice(["", name + " ", "../x"]): header.pop(name)}),
    }
    how = rng.choice([*edits, "twice", "long", "claim", "encoding", "list", "deep"])
    if how in edits:
        edits[how]()
    text = json.dumps(header).encode()
    if how == "twice":
        text = text[:-1] + b", " + json.dumps({name: header[other]}).encode()[1:]
    elif how == "long":
        text += b" " * rng.choice([1, 7, 1000]) + rng.choice([b"{", b"x", b"\0"])
    elif how == "encoding":
        text = text.decode().encode(rng.choice(["utf-16", "utf-32-le", "utf-8-sig"]))
    elif how == "list":
        text = b"{" + b'"a":' * 3 + text + b"}"
    elif how == "deep":
        text = b'{"__metadata__": ' + b"[" * 10**5 + b"]" * 10**5 + b"," + text[1:]
    claimed = len(text)
    if how == "claim":
        claimed = rng.choice(
            [0, 1, claimed - 1, claimed + 1, len(base.data), 10**8, 2**63, 2**64 - 1]
        )
    data = claimed.to_bytes(8, "little") + text + payload
    return Mutation("", base, data, refuse=text != unedited or claimed != len(text))


def rezipped(
    data: bytes, edit: Callable[[str, bytes], list[tuple[str, bytes]]], **options
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", **options) as new:
        for info in old.infolist():
            content = data[data_offset(data, info) :][: info.file_size]
            for name, changed in edit(info.filename, content):
                new.writestr(zipfile.ZipInfo(name), changed, options.get("compression"))
    return buffer.getvalue()


def data_offset(data: bytes, info: zipfile.ZipInfo) -> int:
    return info.header_offset + 30 + sum(struct.unpack_from("<2H", data, info.header_offset + 26))


def archive_edit(rng: random.Random, base: Base) -> Mutation:
    """A zip with other records, or with a directory that says something else than its headers."""
    data = base.data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        directory = archive.start_dir
    tensors = [info.filename for info in infos if "/data/" in info.filename]
    a, b = rng.sample(tensors, 2)
    first = rng.choice(infos)

    def records(edit: Callable[[str, bytes], list[tuple[str, bytes]]], **options) -> bytes:
        return rezipped(data, edit, **options)

    def directory_field(offset: int, size: int) -> bytes:
        """Any field of any entry of the directory."""
        name = rng.choice(infos).filename.encode()
        at = data.index(name, directory) - 46 + offset
        value = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])
        return data[:at] + value + data[at + size :]

    def two_fields_exchanged(offset: int) -> bytes:
        ats = sorted(data.index(name.encode(), directory) - 46 + offset for name in (a, b))
        changed = bytearray(data)
        changed[ats[0] : ats[0] + 4], changed[ats[1] : ats[1] + 4] = (
            data[ats[1] : ats[1] + 4],
            data[ats[0] : ats[0] + 4],
        )
        return bytes(changed)

    size = len(data)
    edits: dict[str, Callable[[], bytes]] = {
        "packed": lambda: records(lambda n, x: [(n, x)], compression=zipfile.ZIP_DEFLATED),
        "twice": lambda: records(lambda n, x: [(n, x)] + [(n, bytes(len(x)))] * (n == a)),
        "twice in front": lambda: records(lambda n, x: [(n, bytes(len(x)))] * (n == a) + [(n, x)]),
        "other case": lambda: records(
            lambda n, x: [(n.replace("/data/", "/Data/"), x[::-1])] * (n == a) + [(n, x)]
        ),
        "NUL": lambda: records(lambda n, x: [(n, x)]).replace(a.encode(), a[:-1].encode() + b"\0"),
        "no record": lambda: records(lambda n, x: [(n, x)] * (n != a)),
        "one more": lambda: records(lambda n, x: [(n, x)] + [(n + "9", x)] * (n == a)),
        "other folder": lambda: records(lambda n, x: [(n.replace("/data/", "/../data/"), x)]),
        "two folders": lambda: records(lambda n, x: [("b" + n, x[::-1]), (n, x)]),
        "no folder": lambda: records(lambda n, x: [(n.partition("/")[2], x)]),
        "longer": lambda: records(lambda n, x: [(n, x + x * (n == a))]),
        "shorter": lambda: records(lambda n, x: [(n, x[: len(x) - 4 * (n == a)])]),
        "TorchScript": lambda: records(lambda n, x: [(n, x), ("archive/constants.pkl", b"")]),
        "bytes moved": lambda: records(lambda n, x: [(n, {a: x + x[:1], b: x[:-1]}.get(n, x))]),
        "alignment": lambda: records(lambda n, x: [(n, b"0" if n.endswith("_alignment") else x)]),
        "byte order": lambda: records(lambda n, x: [(n, b"big" if n.endswith("order") else x)]),
        "comment": lambda: data[:-2] + struct.pack("<H", 5) + b"PK\5\6x",
        "offsets exchanged": lambda: two_fields_exchanged(42),
        "sizes exchanged": lambda: two_fields_exchanged(24),
        "checksum": lambda: directory_field(16, 4),
        "size": lambda: directory_field(rng.choice([20, 24]), 4),
        "offset": lambda: directory_field(42, 4),
        "method or flags": lambda: directory_field(rng.choice([8, 10]), 2),
        "lengths": lambda: directory_field(rng.choice([28, 30, 32]), 2),
        "end": lambda: data[: (at := rng.randrange(size - 98, size))] + b"\xff" + data[at + 1 :],
        "header": lambda: (
            data[: (at := first.header_offset + rng.randrange(30))]
            + rng.randbytes(1)
            + data[at + 1 :]
        ),
        "name in header": lambda: (
            data[: first.header_offset + 30] + b"x" + data[first.header_offset + 31 :]
        ),
    }
    strict = {"packed", "twice", "twice in front", "other case", "NUL", "no record", "one more"}
    strict |= {
        "bytes moved",
        "alignment",
        "byte order",
        "other folder",
        "two folders",
        "longer",
        "shorter",
        "TorchScript",
        "comment",
    }
    how = rng.choice(list(edits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Mutation("", base, edits[how](), refuse=how in strict)


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def function(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def calls() -> Iterator[bytes]:
    """Opcodes that leave one value, and a trace where the value comes about unrestricted."""
    trace, shell, code = text("trace"), text("touch trace"), text("open('trace', 'w').close()")
    inner = text("__import__('os').system('touch trace')")
    bomb = pickle.dumps(Call(os.system, "touch trace"), 2)
    quoted = b"B" + struct.pack("<I", len(bomb)) + bomb
    for path, argument in [
        ("os.system", shell),
        ("posix.system", shell),
        ("nt.system", shell),
        ("subprocess.getoutput", shell),
        ("subprocess.call", b"](" + text("touch") + trace + b"e"),
        ("builtins.eval", inner),
        ("builtins.exec", code),
        ("__builtin__.eval", inner),
        ("timeit.timeit", code),
        ("code.InteractiveInterpreter", b"}"),
        ("pickle.loads", quoted),
        ("_pickle.loads", quoted),
        ("torch.storage._load_from_bytes", quoted),
        ("torch.utils.collect_env.run", shell),
        ("torch._dynamo.guards.eval", inner),
        ("numpy.testing._private.utils.runstring", code + b"}"),
        ("runpy.run_path", trace),
        ("logging.FileHandler", trace),
        ("pathlib.Path.touch", function("pathlib.Path") + trace + b"\x85R"),
        ("_io.open", trace + text("w")),
    ]:
        yield function(path) + b"(" + argument + b"tR"
    yield b"(cos\nsystem\nS'touch trace'\no"  # OBJ
    yield b"(S'touch trace'\nios\nsystem\n"  # INST
    yield text("os") + text("system") + b"\x93" + shell + b"\x85R"  # STACK_GLOBAL
    yield function("os.system") + b")\x81" + shell + b"b"  # NEWOBJ
    yield function("subprocess.Popen") + b")}\x92"  # NEWOBJ_EX
    yield b"\x82\x01" + shell + b"\x85R"  # EXT1
    getter = function("builtins.getattr") + b"(" + function("os") + text("system") + b"tR"
    yield getter + shell + b"\x85R"
    attribute = function("operator.attrgetter") + text("system") + b"\x85R"
    yield (
        attribute + function("builtins.__import__") + text("os") + b"\x85R\x85R" + shell + b"\x85R"
    )
    yield function("functools.partial") + function("os.system") + shell + b"\x86R)R"
    yield function("builtins.map") + function("os.system") + b"](" + shell + b"e\x86R"
    rebuild = function("torch._tensor._rebuild_from_type_v2")
    yield rebuild + b"(" + function("os.system") + function("torch.Tensor") + shell + b"\x85}tR"
    wrapper = function("torch._utils._rebuild_wrapper_subclass")
    yield wrapper + b"(" + function("os.system") + b"NNNNNNNtR"
    setstate = b"}" + text("__setstate__") + function("os.system") + b"s"
    yield function("argparse.Namespace") + b")R" + setstate + b"b" + shell + b"b"
    reduce = b"}" + text("__reduce__") + function("os.system") + b"s"
    yield function("collections.OrderedDict") + b")R" + reduce + b"b"
    yield function("torch.Tensor.__setstate__") + b")" + shell + b"\x86R"
    yield b"(" + text("module") + function("os.system") + trace + text("x") + b"tQ"
    yield b"(" + text("storage") + function("os.system") + text("0") + text("cpu") + b"K\x05tQ"
    yield b"Ptouch trace\n"  # PERSID
    yield shell + b"Q"
    yield b"K\x01Q"
    # No code, but meant to exhaust or to crash: deep, huge, or out of bounds
    yield b")" + b"\x85" * (2 * 10**5)
    yield b"]" + b"](" * 10**5 + b"e" * 10**5
    yield function("builtins.bytearray") + b"\x8a\x06" + (1 << 45).to_bytes(6, "little") + b"\x85R"
    yield function("torch.Tensor") + b"\x8a\x06" + (1 << 45).to_bytes(6, "little") + b"\x85R"
    yield function("builtins.bytearray") + b"J\xff\xff\xff\x7f\x85R"
    doubled = b"K\0" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    yield b"}" + doubled + b"K\1s"
    yield doubled + b")R"
    longer = function("_codecs.encode") + text("a" * 1000) + text("latin1") + b"\x86R"
    for _ in range(30):
        longer = function("_codecs.encode") + longer + text("hex") + b"\x86R"
    yield longer
    storage = b"(" + text("storage") + function("torch.FloatStorage") + text("0") + text("cpu")
    expanded = storage + b"K\x01tQK\0J\xff\xff\xff\x7f\x85K\0\x85t"
    expanded = function("torch._utils._rebuild_tensor") + b"(" + expanded + b"R"
    yield function("builtins.set") + expanded + b"\x85R"
    for method in ("get", "items", "keys", "values"):
        hidden = b"}" + text(method) + function("collections.Counter") + b"sb"
        yield function("collections.OrderedDict") + b")R" + hidden
    yield b"X\xff\xff\xff\xff"
    yield b"\x8e" + b"\xff" * 7 + b"\x7f"
    yield function("torch.Tensor") + b"K\x04K\x06\x86R"  # memory that nobody filled
    layout = function("torch.serialization._get_layout") + text("torch.strided") + b"\x85R"
    device = function("torch.device") + text("cpu") + b"\x85R"
    shape = b"K\x04K\x06\x86" + b"K\x06K\x01\x86"
    kind = function("torch.Tensor") + function("torch.float32")
    yield wrapper + b"(" + kind + shape + b"K\x00" + layout + device + b"\x89tR"
    yield (
        function("torch._utils._rebuild_meta_tensor_no_storage")
        + b"("
        + (function("torch.float32") + shape + b"\x89tR")
    )
    yield function("torch.FloatStorage") + b")R"
    yield function("torch._utils._rebuild_tensor") + b"NK\x00))tR"


class Call:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


PLACES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "alone": lambda value, old: b"\x80\x02" + value + b".",
    "in a dictionary": lambda value, old: b"\x80\x02}" + text("model") + value + b"s.",
    "as a name": lambda value, old: b"\x80\x02}" + value + b"K\x01s.",
    "first": lambda value, old: b"\x80\x02" + value + b"0" + old[2:],
    "last": lambda value, old: old[:-1] + text("x") + value + b"s.",
    "in place of a tensor": lambda value, old: old[:-1] + text("fc.weight") + value + b"s.",
}


def hostile_files() -> Iterator[Callable[[], Mutation]]:
    """Every hostile value in every place, and in each pickle of the old format."""

    def made(base: Base, value: bytes, place: str, index: int) -> Mutation:
        data = with_pickle(base.data, functools.partial(PLACES[place], value), index)
        return Mutation("", base, data, refuse=index != 2)  # that one's value is not looked at

    bases = [base for base in BASES if base.kind in ("zip", "legacy")]
    for base, value in itertools.product(bases, calls()):
        for place in PLACES:
            yield functools.partial(made, base, value, place, 3)
        if base.kind == "legacy" and not base.wrapped:
            for index in (0, 1, 2, 4):
                yield functools.partial(made, base, value, "alone", index)


def with_pickle(data: bytes, change: Callable[[bytes], bytes], index: int) -> bytes:
    """The file with its pickle changed; of the five of the old format, the one of this index."""
    if data.startswith(b"PK"):
        return rezipped(data, lambda n, x: [(n, change(x) if n.endswith("/data.pkl") else x)])
    pickles = pickles_of(data)
    tail = data[len(b"".join(pickles)) :]
    pickles[index] = change(pickles[index])
    return b"".join([*pickles, tail])


def other_files() -> Iterator[Callable[[], Mutation]]:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        file.addfile(tarfile.TarInfo("../x"), io.BytesIO())
    escaping = io.BytesIO()
    with zipfile.ZipFile(escaping, "w") as archive:
        archive.writestr("../../data.pkl", b"\x80\x02}.")
    for base in BASES:
        for data in (
            b"",
            b"\0",
            bytes(4096),
            b"<!DOCTYPE html><html>quota exceeded</html>",
            b'{"error": "not found"}',
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            tar.getvalue(),
            escaping.getvalue(),
            gzip.compress(base.data, mtime=0),
            pickle.dumps({"model": [1]}, 4),
            b"PK\3\4" + base.data,
            b"PK\3\4",
            base.data[::-1],
        ):
            yield functools.partial(Mutation, "", base, data, refuse=True)


RANDOM = {
    "bit flips": bit_flip,
    "bit flip beside the tensors": bit_flip_beside_tensors,
    "byte replaced": byte_replaced,
    "truncated": truncation,
    "extended": extension,
    "something in front": prefix,
    "block zeroed": zeroed_block,
    "block overwritten": copied_block,
    "block inserted": inserted_block,
    "block removed": removed_block,
    "blocks exchanged": exchanged_blocks,
    "names exchanged": swapped_names,
    "other tensors": other_tensors,
    "safetensors header edited": header_edit,
    "zip archive edited": archive_edit,
}
ONLY = {"safetensors header edited": "safetensors", "zip archive edited": "zip"}


def mutations(count: int, seed: int) -> Iterator[Mutation]:
    """``count`` files, of every kind alike, all different from their base."""
    rng = random.Random(seed)
    finite = {"hostile pickle": list(hostile_files()), "no checkpoint": list(other_files())}
    for files in finite.values():
        rng.shuffle(files)
    kinds = itertools.cycle([*RANDOM, *finite])
    made = 0
    while made < count:
        kind = next(kinds)
        if kind in finite:
            mutation = finite[kind].pop()() if finite[kind] else None
        else:
            bases = [base for base in BASES if base.kind.startswith(ONLY.get(kind, ""))]
            mutation = RANDOM[kind](rng, rng.choice(bases))
        if mutation is not None and mutation.data != mutation.base.data:
            made += 1
            yield Mutation(kind, mutation.base, mutation.data, mutation.refuse, mutation.others)


Answer = tuple[list[dict[str, bytes]], list[str]]  # tensors of each model loaded; complaints
Loader = Callable[[nn.Module, object], object]
Fetcher = Callable[[Weight, str], object]


def out_of_memory(error: BaseException | None) -> bool:
    """Whether only the limit stopped a reader that then called the file damaged."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__
    return False


def loaded(how: Callable[[nn.Module], object]) -> Answer:
    model = Net()
    before = {name: raw(tensor) for name, tensor in model.state_dict().items()}
    accepted, wrong = True, []
    try:
        how(model)
    except CheckpointError as error:
        accepted = False
        if out_of_memory(error):
            wrong.append(f"more than {BYTES >> 30} GiB were asked for")
    except Exception as error:
        accepted = False
        wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
    after = {name: raw(tensor) for name, tensor in model.state_dict().items()}
    if not accepted and after != before:
        wrong.append("the model changed although the file was refused")
    return [after] * accepted, wrong


def answer(path: Path, cached: Path, weight: Weight, loader: Loader, fetcher: Fetcher) -> Answer:
    """Load one file in every way; ``cached`` is where `fetch` looks for the undamaged one."""
    tensors, wrong = loaded(lambda model: loader(model, path))
    more, complaints = loaded(lambda model: loader(model, read(path)))
    wrong += complaints
    if tensors != more:
        wrong.append("load and read differ")
    cached.write_bytes(path.read_bytes())
    try:
        fetcher(weight, "mutation")
        wrong.append("accepted although the hash is known")
    except CheckpointError:
        pass
    if os.listdir():
        wrong.append(f"code ran: {os.listdir()} appeared")
        for name in os.listdir():
            os.remove(name)
    return tensors, wrong


@dataclass
class Job:
    """A process that answers for one file after another, and is replaced when it dies."""

    folder: Path
    address: str
    loader: Loader
    fetcher: Fetcher

    def __post_init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None
        (self.folder / "empty").mkdir(exist_ok=True)

    def __call__(self, mutation: Mutation) -> Answer:
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.pipe, end = context.Pipe()
            self.process = context.Process(target=self.serve, args=(end,), daemon=True)
            self.process.start()
            end.close()
        path = self.folder / "mutation.pth"
        path.write_bytes(mutation.data)
        try:
            self.pipe.send((path, BASES.index(mutation.base)))
            if self.pipe.poll(SECONDS):
                return self.pipe.recv()
            complaint = f"no answer for {SECONDS} seconds"
        except (EOFError, ConnectionError):
            complaint = ""
        self.close()
        return [], [complaint or f"the process died ({self.code})"]

    def close(self) -> None:
        if self.process is not None:
            self.process.join(1)  # one that died has a code of its own to tell
            self.process.kill()
            self.process.join()
            self.code, self.process = self.process.exitcode, None
            self.pipe.close()

    def serve(self, pipe) -> None:
        warnings.simplefilter("ignore")
        faulthandler.disable()  # the parent tells what died
        os.environ.pop("VITARIUM_LOCK", None)  # the user's own file
        os.environ.update(
            TORCH_HOME=str(self.folder / "home"),
            HF_HUB_OFFLINE="",
            TRANSFORMERS_OFFLINE="",
            no_proxy="*",
        )
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        known = []
        for base in BASES:  # the undamaged files, downloaded
            digest = hashlib.sha256(base.data).hexdigest()
            weight = Weight(
                f"{self.address}/{BASES.index(base)}.pth", size=len(base.data), sha256=digest
            )
            known.append((fetch(weight, "mutation", progress=False), weight))
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.chdir(self.folder / "empty")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        while True:
            path, index = pipe.recv()
            pipe.send(answer(path, *known[index], self.loader, self.fetcher))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The undamaged files, on a server of this machine."""
    folder.mkdir()
    for index, base in enumerate(BASES):
        (folder / f"{index}.pth").write_bytes(base.data)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def run(
    count: int,
    seed: int = 0,
    loader: Loader = load,
    fetcher: Fetcher = fetch,
    keep: Path | None = None,
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Make ``count`` files, load and judge each.

    Returns:
        Verdicts by kind of mutation, and a line for everything that went wrong.
    """
    table: dict[str, Counter[str]] = defaultdict(Counter)
    failures = []
    with tempfile.TemporaryDirectory() as name, served(Path(name) / "served") as address:
        job = Job(Path(name), address, loader, fetcher)
        for number, mutation in enumerate(mutations(count, seed)):
            tensors, wrong = job(mutation)
            wrong += ["accepted with other tensors"] * (not all(map(mutation.allows, tensors)))
            verdict = "wrong" if wrong else "harmless" if tensors else "refused"
            table[mutation.kind].update(["made", verdict])
            if wrong:
                what = f"{number}: {mutation.kind} of {mutation.base.kind}"
                failures.append(f"{what}{' (wrapped)' * mutation.base.wrapped}: {'; '.join(wrong)}")
                if keep is not None:
                    keep.mkdir(exist_ok=True)
                    (keep / f"{number}.pth").write_bytes(mutation.data)
        job.close()
    return table, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="files to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that went wrong")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table, failures = run(args.count, args.seed, keep=args.keep)
    columns = ("made", "refused", "harmless", "wrong")
    print(f"{'mutation':30}" + "".join(f"{column:>10}" for column in columns))
    total: Counter[str] = sum(table.values(), Counter())
    for kind, row in [*table.items(), ("all", total)]:
        print(f"{kind:30}" + "".join(f"{row[column]:10}" for column in columns))
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
