"""Reading, unwrapping, renaming, comparing and loading checkpoints."""

from __future__ import annotations

import argparse
import ast
import doctest
import functools
import gzip
import io
import json
import os
import pickle
import re
import tarfile
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import nn

from vitarium import checkpoints
from vitarium.checkpoints import (
    CheckpointError,
    Renames,
    compare,
    convert,
    files,
    load,
    read,
    renames,
    unwrap,
)
from vitarium.heads.features import FeatureBackbone


class Toy(nn.Module):
    """Ours: stages.{i}.{downsample,mix}, norm, head. The authors' ends a stage by downsampling."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(4, 6)} | ({"downsample": nn.Linear(6, 4)} if i else {}))
            for i in range(3)
        )
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, num_classes)


class Wrapper(nn.Module):
    """A toy inside a model that needs no classifier and adds a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Toy()
        del self.model.head, self.model.norm
        self.norm0 = nn.LayerNorm(6)

    def checkpoint_ignore(self) -> dict[str, str]:
        return {"head.*": "classifier", "norm.*": "norm before the classifier"}


# Like FeatureBackbone, it stands in another module than the filter of the model inside.
Wrapper.__module__ = nn.__name__

TABLE = Renames(
    [
        ("layers.{i}.downsample.", "stages.{i+1}.downsample."),
        ("layers.{i}.", "stages.{i}."),
        ("fc.weight", "head.weight"),
        ("fc.bias", "head.bias"),
    ],
    values={"stages.{i}.mix.weight": (lambda w: w.t() * 2, lambda w: w.t() / 2)},
)


def checkpoint_filter_fn(state_dict, model):
    return TABLE.to_ours(state_dict, model)


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy()


def authors(model: nn.Module) -> dict[str, torch.Tensor]:
    return TABLE.to_authors(model.state_dict())


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_names_go_both_ways_with_shifted_fields():
    pairs = {
        "layers.0.downsample.weight": "stages.1.downsample.weight",
        "layers.1.mix.bias": "stages.1.mix.bias",
        "layers.11.downsample.norm.weight": "stages.12.downsample.norm.weight",
        "fc.weight": "head.weight",
        "fc.weight_g": "fc.weight_g",
        "norm.weight": "norm.weight",
    }
    for theirs, ours in pairs.items():
        assert TABLE.ours(theirs) == ours
        assert TABLE.authors(ours) == theirs


def test_the_documented_example_runs():
    assert doctest.testmod(renames) == (0, 3)


def test_a_field_that_occurs_twice_is_one_number():
    table = Renames([("stage{i}.stage{i}_norm.", "stages.{i-1}.norm.")])
    assert table.ours("stage2.stage2_norm.weight") == "stages.1.norm.weight"
    assert table.authors("stages.1.norm.weight") == "stage2.stage2_norm.weight"
    for name in ("stage2.stage3_norm.weight", "stage0.stage0_norm.weight", "stage02.stage02_norm."):
        assert table.ours(name) == name


def test_conversion_there_and_back_is_exact_and_leaves_its_input_alone():
    model = toy()
    theirs = authors(model)
    assert set(theirs) & {"layers.0.downsample.weight", "fc.bias"}
    assert torch.equal(theirs["layers.0.mix.weight"], model.stages[0]["mix"].weight.t() / 2)
    before = {name: tensor.clone() for name, tensor in theirs.items()}
    ours = TABLE.to_ours(theirs, model)
    assert {name: tensor.tolist() for name, tensor in ours.items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }
    assert same(theirs, before)


def test_our_own_format_is_left_as_it_is():
    model = toy()
    own = copied(model)
    assert same(convert(own, model), own)
    del own["norm.bias"]
    assert same(convert(own, model), own)


def test_names_that_collide_or_do_not_lead_back_are_errors():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    tensor = torch.zeros(1)
    collide = Renames([("x.", "a."), ("y.", "a.")])
    with pytest.raises(CheckpointError, match=r"x\.bias and y\.bias would both become a\.bias"):
        collide.to_ours({"x.bias": tensor, "y.bias": tensor}, model)
    with pytest.raises(CheckpointError, match=r"y\.bias is ambiguous.*leads back to x\.bias"):
        collide.to_ours({"y.bias": tensor}, model)
    taken = Renames([("x.", "a.")])
    with pytest.raises(CheckpointError, match="ambiguous"):
        taken.to_ours({"a.bias": tensor, "x.weight": tensor, "x.bias": tensor}, model)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("", "a.")], "template"),
        ([("a.{i", "b.{i}")], "template"),
        ([("a.{i*2}.", "b.{i}.")], "template"),
        ([("a.{i}.", "b.")], "same fields"),
        ([("a.{i}.", "b.{j}.")], "same fields"),
        ([("a.", "b")], "two prefixes"),
    ],
)
def test_tables_that_cannot_be_inverted_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        Renames(rows)


def test_values_need_rows():
    with pytest.raises(ValueError, match="values"):
        Renames([], values={"a.weight": (torch.neg, torch.neg)})


def test_a_tensor_that_cannot_be_converted_is_named():
    theirs = authors(toy())
    theirs["layers.1.mix.weight"] = torch.zeros(2, 3, 4)
    with pytest.raises(CheckpointError, match=r"stages\.1\.mix\.weight.*\[2, 3, 4\]"):
        convert(theirs, toy())


STATE = {"a.weight": torch.arange(3.0), "b.bias": torch.arange(2.0)}
WRAPPED = {
    "plain": STATE,
    "model": {"model": STATE, "epoch": 3},
    "state_dict": {"state_dict": STATE, "meta": {"x": [1]}, "optimizer": {}},
    "ema": {"state_dict": {"a.weight": torch.zeros(1)}, "state_dict_ema": STATE},
    "model_ema": {"model": {"a.weight": torch.zeros(1)}, "model_ema": STATE},
    "no ema": {"model": STATE, "model_ema": None},
    "nested": {"model": {"state_dict": STATE}},
    "module": {f"module.{name}": tensor for name, tensor in STATE.items()},
    "compiled": {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()},
    "detector": {
        "state_dict": {f"backbone.{name}": tensor for name, tensor in STATE.items()}
        | {"neck.conv.weight": torch.zeros(1), "roi_head.fc.bias": torch.zeros(1)}
    },
}


@pytest.mark.parametrize("obj", WRAPPED.values(), ids=WRAPPED.keys())
def test_unwrap_finds_the_tensors(obj):
    assert same(unwrap(obj), STATE)


def test_unwrap_obeys_a_given_wrapper():
    assert list(unwrap(WRAPPED["model_ema"], "model")) == ["a.weight"]
    assert unwrap(WRAPPED["model_ema"], "model")["a.weight"].shape == (1,)
    with pytest.raises(CheckpointError, match="state_dict_ema"):
        unwrap(WRAPPED["model"], "state_dict_ema")
    with pytest.raises(CheckpointError, match="'model'"):
        unwrap(WRAPPED["model"], "plain")
    with pytest.raises(ValueError, match="wrapper"):
        unwrap(WRAPPED["model"], "net")


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([STATE], "list"),
        ({}, "empty"),
        ({"model": {}}, "empty"),
        ({"a": torch.zeros(1), "b": 3}, "int at 'b'"),
        ({0: torch.zeros(1)}, "at 0"),
        ({"a\x1b[31m": torch.zeros(1)}, r"can be printed, got 'a\\x1b\[31m'"),
        ({"\ud800": torch.zeros(1)}, r"can be printed, got '\\ud800'"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({"a": torch.nested.nested_tensor([torch.ones(2)])}, "nested"),
        ({"a": torch.ones(1, dtype=torch.uint8).view(torch.bits8)}, r"got torch\.bits8 in a"),
        ({"a": torch.ones(1).expand(1 << 30, 1 << 30)}, "values of their own in a"),
        ({"a": torch.ones(9).as_strided((3, 3), (2, 1))}, "9 values of their own in a"),
    ],
)
def test_unwrap_refuses_what_is_no_state_dict(obj, message):
    with pytest.raises(CheckpointError, match=message):
        unwrap(obj)


def test_unwrap_takes_views_that_share_nothing_within():
    x = torch.arange(24.0).view(2, 3, 4)
    state = {"t": x.permute(2, 0, 1), "s": x[:, 1:, ::2], "1": x[:1].expand(1, -1, -1), "0": x[:0]}
    assert same(
        unwrap({**state, "e": torch.ones(1).expand(0, 5), "x": x[0, 0, 0]}),
        {**state, "e": torch.ones(0, 5), "x": torch.zeros(())},
    )


def zipped(obj) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def legacy(obj) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


FORMATS = {"safetensors": save, "zip": zipped, "legacy": legacy}


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS.keys())
def test_read_goes_by_content_not_by_name(write, tmp_path):
    for name in ("x.pth", "x.safetensors", "x"):
        (tmp_path / name).write_bytes(write(STATE))
        assert {k: v.tolist() for k, v in read(tmp_path / name).items()} == {
            k: v.tolist() for k, v in STATE.items()
        }


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS.keys())
def test_a_mapped_file_holds_the_same_tensors_and_is_never_written_to(write, name, tmp_path):
    path, data = tmp_path / name, write(STATE)
    path.write_bytes(data)
    mapped = read(path, mmap=True)
    assert same(mapped, STATE)
    for tensor in mapped.values():
        tensor += 1
    assert path.read_bytes() == data


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
@pytest.mark.parametrize("write", [save, zipped], ids=["safetensors", "zip"])
def test_a_mapped_file_takes_no_memory_of_its_own(write, tmp_path):
    size = 32 << 20
    (tmp_path / "x.pth").write_bytes(write({"a": torch.ones(size // 4)}))
    before = own_bytes()
    mapped = read(tmp_path / "x.pth", mmap=True)
    assert mapped["a"].sum() == size // 4
    assert own_bytes() - before < size // 4


def test_a_header_whose_length_looks_like_a_pickle_is_safetensors(tmp_path):
    name = "n" * 400
    while (data := save({name: torch.ones(1)}))[0] != 0x80:
        name += "n"
    (tmp_path / "x.pth").write_bytes(data)
    assert list(read(tmp_path / "x.pth")) == [name]


def test_read_takes_training_states_with_their_arguments(tmp_path):
    args = argparse.Namespace(lr=0.1, model="nat_tiny")
    torch.save({"model": STATE, "args": args, "epoch": 1}, tmp_path / "x.pth")
    assert same(unwrap(read(tmp_path / "x.pth")), STATE)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS.keys())
def test_every_truncation_is_refused(write, tmp_path):
    whole = write({"a.weight": torch.arange(600.0), "b": torch.ones(3)})
    path = tmp_path / "x.pth"
    for length in {*range(0, len(whole), 97), 1, 8, 9, 50, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            read(path)


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO())
    return buffer.getvalue()


def scripted() -> bytes:
    return archive({"x/constants.pkl": b"", "x/data.pkl": b"", "x/code/__torch__.py": b""})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html><body>quota exceeded</body></html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b'{"error": "not found"}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (gzip.compress(b"x", mtime=0), "gzip archive"),
        (tarred(), "tar archive"),
        (archive({"readme.txt": b"hello"}), "another zip"),
        (scripted(), "TorchScript"),
        (archive({"x/data.pkl": bytes(100000)}, zipfile.ZIP_DEFLATED), "is packed"),
        (bytes(1000), "unknown format"),
        (pickle.dumps({"a": torch.ones(2).numpy()}, protocol=2), "refused.*numpy"),
        (zipped([1, 2]), "dictionary, got list"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(data, message, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_read_names_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="folder"):
        read(tmp_path)


def safetensors_file(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (safetensors_file({"a": entry(offsets=(0, 4))}), r"\[2\] of F32 in 4 bytes"),
        (safetensors_file({"a": entry(shape=(2**62,))}), "of F32 in 8 bytes"),
        (safetensors_file({"a": entry(shape=(2**62, 2**62))}), "describes a"),
        (safetensors_file({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}), "describes a"),
        (safetensors_file({"a": entry(shape=(-1,))}), "describes a"),
        (safetensors_file({"a": entry(shape=(True,))}), "describes a"),
        (safetensors_file({"a": entry(dtype="F31")}), "describes a"),
        (safetensors_file({"a": {"dtype": "F32"}}), "describes a"),
        (safetensors_file({"a": entry(), "b": entry()}), "overlap"),
        (safetensors_file({"a": entry(shape=(1,), offsets=(4, 8))}), "gaps"),
        (safetensors_file({"a": entry()}, bytes(9)), "promises 8 bytes"),
        (safetensors_file(b'{"a": 1, "a": 2}'), "twice"),
        (safetensors_file(b'{"a": ' + b"[" * 100000), "not JSON"),
        ((10**8 - 1).to_bytes(8, "little") + b'{"a":', "header claims"),
    ],
)
def test_a_safetensors_header_is_checked_before_any_tensor(data, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read(path)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS.keys())
def test_an_outline_is_what_read_returns_without_data(write, tmp_path):
    state = {"a": torch.ones(2, 3).half(), "b": torch.arange(4), "empty": torch.ones(0, 2)}
    if write is not save:
        state = {"model": state, "epoch": 3}
    (tmp_path / "x.pth").write_bytes(write(state))
    whole, outline = (f(tmp_path / "x.pth") for f in (read, checkpoints.outline))
    assert list(outline) == list(whole)
    assert outline.get("epoch") == whole.get("epoch")
    described, whole = unwrap(outline), unwrap(whole)
    assert all(tensor.is_meta for tensor in described.values())
    assert {k: (t.shape, t.dtype) for k, t in described.items()} == {
        k: (t.shape, t.dtype) for k, t in whole.items()
    }


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("head.weight", (5 << 20, 6 << 10), r"head\.weight expected \[5, 6\] float32, got \[5242"),
        ("extra.weight", (2**35,), r"1 unexpected: extra\.weight"),
    ],
)
def test_a_file_of_absurd_tensors_is_refused_unread(name, shape, message, tmp_path, monkeypatch):
    path, position, header = tmp_path / "x.safetensors", 0, {}
    for key, tensor in (copied(toy()) | {name: torch.empty(shape, device="meta")}).items():
        size = tensor.numel() * tensor.itemsize
        dtype = "F32" if tensor.is_floating_point() else "I64"
        header[key] = entry(dtype, tensor.shape, (position, position + size))
        position += size
    path.write_bytes(safetensors_file(header, b""))
    os.truncate(path, path.stat().st_size + position)  # a hole, which takes no disk space
    monkeypatch.setattr(files, "load_file", lambda path: pytest.fail("read"))
    for function in (load, checkpoints.check_fits):
        with pytest.raises(CheckpointError, match=message):
            function(toy(), path)
    assert path.stat().st_size > 2**36


def test_check_fits_says_what_load_would_do(tmp_path):
    source, model = toy(1), toy(2)
    before = copied(model)
    for write in (zipped, legacy):
        (tmp_path / "x.pth").write_bytes(write({"model": authors(source)}))
        report = checkpoints.check_fits(model, tmp_path / "x.pth")
        assert report.matched == tuple(before)
        assert same(copied(model), before)
        assert load(toy(2), tmp_path / "x.pth") == report


def unverified(obj) -> bytes:
    assert torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        return zipped(obj)
    finally:
        torch.serialization.set_crc32_options(True)


def records(data: bytes) -> list[tuple[zipfile.ZipInfo, int]]:
    """Every record of an archive, and where its bytes begin."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [
            (info, info.header_offset + 30 + sum(data[info.header_offset + i] for i in (26, 28)))
            for info in file.infolist()
        ]


def test_a_flipped_bit_of_any_record_of_a_zip_is_found(tmp_path):
    data, path = zipped(STATE), tmp_path / "x.pth"
    for info, start in records(data):
        for position in range(start, start + info.file_size):
            flipped = bytearray(data)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=re.escape(info.filename)):
                read(path)


def test_zips_without_checksums_are_read(tmp_path):
    path, data = tmp_path / "x.pth", unverified(STATE)
    assert {info.CRC for info, _ in records(data)} == {0}
    path.write_bytes(data)
    assert same(read(path), STATE)
    with torch.serialization.skip_data():  # to be filled in later
        torch.save(STATE, path)
    assert {info.CRC == 0 for info, _ in records(path.read_bytes())} == {True, False}
    assert same(read(path), {name: torch.zeros_like(STATE[name]) for name in STATE})


def test_a_zip_without_checksums_has_its_tensors_in_one_place(tmp_path):
    data = bytearray(unverified(STATE))
    data[data.index(b"archive/data/0") - 2] -= 4  # the padding in front of the tensor
    (tmp_path / "x.pth").write_bytes(data)
    assert torch.load(tmp_path / "x.pth", weights_only=True)["a.weight"].tolist() != [0, 1, 2]
    with pytest.raises(CheckpointError, match="data/0 has two sizes"):
        read(tmp_path / "x.pth")


def edited(data: bytes, edit) -> bytes:
    """The archive with other records: a function of (name, bytes) -> list of such pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            for name, content in edit(info.filename, old.read(info)):
                new.writestr(name, content)
    return buffer.getvalue()


def renamed_header(data: bytes) -> bytes:
    """The first header of `b` is another's than the directory says."""
    at = data.index(b"archive/data/1")
    return data[:at] + b"archive/data/0" + data[at + 14 :]


def changed_entry(data: bytes, offset: int, value: bytes) -> bytes:
    """The directory says something else of the first tensor."""
    at = data.rindex(b"archive/data/0") - 46 + offset
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data + b"x", "behind its end|truncated"),
        (lambda data: data[:-2] + b"\1\0x", "behind its end"),
        (lambda data: data[:4] + data, "end record is not where"),
        (renamed_header, "another's"),
        (lambda data: data[:-14] + b"\x07" + data[-13:], "directory"),
        (lambda data: changed_entry(data, 38, b"\x10"), "is a folder"),
        (lambda data: changed_entry(data, 16, b"\0\0\0\0"), "two sizes"),
        (lambda data: changed_entry(data, 20, b"\x08"), "two sizes"),
        (lambda data: edited(data, lambda n, x: [(n, x)] * (1 + n.endswith("0"))), "one name"),
        (
            lambda data: edited(
                data,
                lambda n, x: (
                    [(n, x)] + [(n.upper().replace("ARCHIVE", "archive"), x)] * n.endswith("/0")
                ),
            ),
            "one name",
        ),
        (
            lambda data: edited(data, lambda n, x: [("y/" + n.replace("a", "b"), x), (n, x)]),
            "folders",
        ),
        (lambda data: edited(data, lambda n, x: [(n, x), ("y" + n, x)]), "folders"),
        (
            lambda data: edited(data, lambda n, x: [(n, x), (n + "/../../x", x)]),
            "one of its records leads elsewhere",
        ),
        (lambda data: edited(data, lambda n, x: [(n, x + x * n.endswith("/0"))]), "take"),
        (
            lambda data: edited(data, lambda n, x: [(n, x)] + [(n + "0", x)] * n.endswith("/1")),
            "take",
        ),
        (lambda data: edited(data, lambda n, x: [(n, x)] * (not n.endswith("/1"))), "take"),
        (
            lambda data: edited(
                data,
                lambda n, x: [
                    (n, {"0": x + x[:4], "1": x[:-4]}.get(n[-1], x) if "/data/" in n else x)
                ],
            ),
            "not those",
        ),
        (
            lambda data: edited(data, lambda n, x: [(n, b"0" if n.endswith("_alignment") else x)]),
            "_alignment is b'0'",
        ),
        (
            lambda data: edited(data, lambda n, x: [(n, b"big" if n.endswith("order") else x)]),
            "byteorder is b'big', .* expected little",
        ),
        (
            lambda data: edited(
                data,
                lambda n, x: [("archive/Byteorder", b"big") if n.endswith("order") else (n, x)],
            ),
            "Byteorder is b'big'",
        ),
    ],
)
def test_a_zip_that_two_readers_could_read_differently_is_refused(damage, message, tmp_path):
    path, data = tmp_path / "x.pth", zipped(STATE)
    path.write_bytes(edited(data, lambda name, content: [(name, content)]))
    assert same(read(path), STATE)
    path.write_bytes(damage(data))
    for how in (read, functools.partial(read, mmap=True), checkpoints.outline):
        with pytest.raises(CheckpointError, match=message):
            how(path)


def test_a_legacy_file_whose_storages_are_not_all_filled_is_refused(tmp_path):
    path, data = tmp_path / "x.pth", legacy(STATE)
    path.write_bytes(data)
    assert same(read(path), STATE)
    path.write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match="take 36 bytes, and the file has 37"):
        read(path)
    *_, keys = [m.start() for m in re.finditer(rb"\x80\x02\]", data)]
    (first, _), payload = re.findall(rb"X....[0-9]+q.", data[keys:]), data[-36:]
    sizes = [
        int.from_bytes(payload[i : i + 8], "little") for i in (0, 36 - 8 - 4 * (5 - payload[0]))
    ]
    assert sorted(sizes) == [2, 3]
    kept = payload[: 8 + 4 * sizes[0]]
    path.write_bytes(data[:keys] + b"\x80\x02](" + first + b"e." + kept)
    torch.load(path, weights_only=True)  # memory that nobody filled
    with pytest.raises(CheckpointError, match="take 36 bytes"):
        read(path)


def test_a_legacy_file_that_fills_one_storage_twice_is_refused(tmp_path):
    path, data = tmp_path / "x.pth", legacy({"a": torch.ones(3), "b": torch.ones(3)})
    keys = data.rindex(b"\x80\x02]")
    first, second = re.findall(rb"X....[0-9]+q.", data[keys:])
    listed = b"\x80\x02]q\0(" + first + second + b"e."
    assert data[keys:].startswith(listed)
    for other in (listed.replace(second, first), b"\x80\x02(" + first + first + b"t."):
        path.write_bytes(data[:keys] + other + data[keys:].removeprefix(listed))
        torch.load(path, weights_only=True)  # memory that nobody filled
        with pytest.raises(CheckpointError, match="not those that the file has bytes for"):
            read(path)


@pytest.mark.parametrize("write", [zipped, legacy], ids=["zip", "legacy"])
def test_tuples_too_deep_to_be_hashed_are_refused(write, tmp_path):
    path = tmp_path / "x.pth"
    for depth, message in ((90, None), (10**6, "more than 200 deep")):
        pickled = b"\x80\x02}(X\x05\0\0\0model}" + b")" + b"\x85" * depth + b"K\1u."
        path.write_bytes(with_pickle(write({}), pickled))
        if message is None:
            assert read(path) == {"model": {}, nested(depth): 1}
        else:
            with pytest.raises(CheckpointError, match=message):
                read(path)
            with pytest.raises(CheckpointError, match=message):
                checkpoints.outline(path)


@pytest.mark.parametrize("write", [zipped, legacy], ids=["zip", "legacy"])
def test_a_tensor_that_the_file_does_not_hold_is_refused(write, tmp_path):
    pickled = b"\x80\x02}(X\1\0\0\0actorch\nTensor\nK\2K\3\x86Ru."
    (tmp_path / "x.pth").write_bytes(with_pickle(write({}), pickled))
    assert torch.load(tmp_path / "x.pth", weights_only=True)["a"].shape == (2, 3)
    with pytest.raises(CheckpointError, match=r"refused: it asks to run torch\.Tensor"):
        read(tmp_path / "x.pth")


def word(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def doubled(value: bytes, times: int) -> bytes:
    for i in range(times):
        value += bytes([ord("q"), i, ord("h"), i]) + b"\x86"
    return value


ENCODED = b"c_codecs\nencode\n"
LATIN = ENCODED + word("a") + word("latin1") + b"\x86R"
ORDERED = b"ccollections\nOrderedDict\n)R"
STATE_OF_SPACE = b"cargparse\nNamespace\n)\x81}"
STORED = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word("0") + word("cpu") + b"K\1tQ"
EXPANDED = (  # a tensor of 2**31 - 1 elements out of one
    b"ctorch._utils\n_rebuild_tensor\n(" + STORED + b"K\0J\xff\xff\xff\x7f\x85K\0\x85tR"
)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        # No end, or all memory: what is in itself often, and calls of functions on torch's list.
        (b"}" + doubled(b"K\0", 60) + b"K\1s", "repeated too often"),
        (doubled(b"K\0", 60) + b")R", "more than tensors and plain data"),
        (b"cbuiltins\nset\n](" + doubled(b"K\0", 60) + b"e\x85R", "repeated too often"),
        (b"cbuiltins\nset\n" + EXPANDED + b"\x85R", "more than tensors and plain data"),
        (b"ccollections\nOrderedDict\n](" + EXPANDED + b"e\x85R", "more than tensors and plain"),
        (b"ctorch\nSize\n" + EXPANDED + b"R", "more than tensors and plain data"),
        (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", "more than tensors and plain data"),
        (ENCODED + LATIN + word("hex") + b"\x86R", "more than tensors and plain data"),
        (ENCODED + word("a") + word("idna") + b"\x86R", "more than tensors and plain data"),
        # Attributes that hide methods
        (ORDERED + b"}" + word("get") + b"K\1sb", "more than tensors and plain data"),
        (STATE_OF_SPACE + word("__setstate__") + b"K\1sb", "more than tensors and plain data"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n", r"to run torch\._tensor\._rebuild_from_type"),
        (b"ctorch._utils\n_rebuild_parameter_with_state\n", "to run .*_parameter_with_state"),
        # Not what the names of the file say
        (b"]q\0h\0a", "contains itself"),
        (STORED + STORED.replace(b"K\1tQ", b"K\2tQ") + b"\x86", "more than tensors and plain"),
    ],
)
@pytest.mark.parametrize("write", [zipped, legacy], ids=["zip", "legacy"])
def test_what_torch_unpickles_but_would_not_write_is_refused(write, value, message, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(with_pickle(write({}), b"\x80\x02}" + word("a") + value + b"s."))
    for function in (read, checkpoints.outline):
        with pytest.raises(CheckpointError, match=message):
            function(path)


@pytest.mark.parametrize("write", [zipped, legacy], ids=["zip", "legacy"])
def test_tensors_and_plain_data_of_every_kind_are_read(write, tmp_path):
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    assert state._metadata
    x, dtypes = torch.arange(6.0), [*files.DTYPES.values()]
    if write is legacy:
        dtypes = [torch.half, torch.bfloat16, torch.double, torch.int64, torch.uint8, torch.bool]
    data = {
        "model": state,
        "views": [x.view(2, 3).T, x[2:], x],
        "parameter": nn.Parameter(x),
        "kinds": [torch.ones(2).to(dtype) for dtype in dtypes],
        "complex": (1j, torch.ones(2, dtype=torch.complex64).conj()),
        "args": argparse.Namespace(lr=0.1, shape=torch.Size([2, 3]), device=torch.device("cpu", 0)),
        "plain": [None, True, False, -1, 2**70, 0.5, "\N{SNOWMAN}", (), {}, [], {1, 2}],
        "bytes": [b"\xff\0", bytearray(b"\xff\0"), bytearray()],
        "counter": Counter("abca"),
        "dtype": torch.bfloat16,
    }
    (tmp_path / "x.pth").write_bytes(write(data))
    for mmap in (False, True):
        found = read(tmp_path / "x.pth", mmap=mmap)
        assert same(unwrap(found), state)
        for kind in ("views", "kinds"):
            for got, expected in zip(found.pop(kind), data[kind], strict=True):
                assert got.dtype == expected.dtype
                assert got.tolist() == expected.tolist()
        assert torch.equal(found.pop("parameter"), x)
        assert torch.equal(found["complex"][1], data["complex"][1])
        assert found["complex"][0] == 1j
        for kind in ("args", "plain", "bytes", "counter", "dtype"):
            assert found[kind] == data[kind]
    checkpoints.outline(tmp_path / "x.pth")


def nested(depth: int) -> tuple:
    value: tuple = ()
    for _ in range(depth):
        value = (value,)
    return value


def with_pickle(data: bytes, pickled: bytes) -> bytes:
    """The file with another pickle as its main one."""
    if data.startswith(b"PK"):
        return edited(data, lambda n, x: [(n, pickled if n.endswith("data.pkl") else x)])
    head, empty, tail = data.rpartition(b"\x80\x02}q\0.")
    assert empty
    return head + pickled + tail


class Hostile:
    """Unpickled without restriction, it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("write", [zipped, legacy], ids=["zip", "legacy"])
def test_a_hostile_pickle_is_refused_and_named_and_does_not_run(write, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trace, path = tmp_path / "trace", tmp_path / "x.pth"
    path.write_bytes(write({"a.weight": torch.ones(1), "b": Hostile(str(trace))}))
    with pytest.raises(CheckpointError, match=r"refused: it asks to run \w+\.system") as caught:
        read(path)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert not trace.exists()
    with pytest.raises(CheckpointError):
        load(toy(), path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file is harmless: this test proves nothing"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"(X\1\0\0\0xios\nsystem\n", "refused: it uses pickle's instruction INST"),
        (b"X\2\0\0\0osX\6\0\0\0system\x93", "refused: it uses .* STACK_GLOBAL, and only tensors"),
        (b"cbuiltins\neval\n", "refused: it asks to run builtins.eval, and only"),
        (b"ccollections.abc\nMapping\n", "it asks to run collections.abc.Mapping, and"),
        (b"X\1\0\0\0xQ", "damaged, or a pickle that asks for more"),
    ],
)
@pytest.mark.parametrize("write", [zipped, legacy], ids=["zip", "legacy"])
def test_what_is_refused_is_named_without_advice_to_run_it(write, value, message, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(with_pickle(write({}), b"\x80\x02}X\1\0\0\0a" + value + b"s."))
    for function in (read, checkpoints.outline):
        with pytest.raises(CheckpointError, match=message) as caught:
            function(path)
        assert "weights_only" not in "".join(traceback.format_exception(caught.value))


def test_no_module_unpickles_without_restriction():
    package = Path(checkpoints.__file__).parents[1]
    calls = [
        (path.relative_to(package), node)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".load", ".loads"))
    ]
    unpicklers = ("torch.load", "torch.hub.load", "pickle.load", "pickle.loads", "np.load")
    calls = [(path, node) for path, node in calls if ast.unparse(node.func) in unpicklers]
    assert Path("checkpoints/pickles.py") in dict(calls)
    for path, node in calls:
        assert ast.unparse(node.func) == "torch.load", path
        assert "weights_only=True" in ast.unparse(node), path


def test_an_old_torch_reads_no_pickles_but_safetensors(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    torch.save(STATE, tmp_path / "x.pth")
    save_file(STATE, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"from torch 2\.10 on, and this is torch 2\.9\.1"):
        read(tmp_path / "x.pth")
    assert same(read(tmp_path / "x.safetensors"), STATE)


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict_ema", "file"])
def test_load_takes_files_and_dictionaries_in_the_authors_format(wrap, tmp_path):
    source, model = toy(1), toy(2)
    state = authors(source)
    obj: object = {wrap: state} if wrap in ("model", "state_dict_ema") else state
    if wrap == "file":
        obj = tmp_path / "x.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, obj)
    report = load(model, obj)
    assert same(copied(model), copied(source))
    assert report == checkpoints.Report(matched=tuple(model.state_dict()))


def broken(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    if how == "missing":
        del state["layers.1.mix.bias"]
    elif how == "unexpected":
        state["layers.1.mix.scale"] = torch.ones(1)
    elif how == "misshapen":
        state["fc.weight"] = torch.ones(7, 6)
    elif how == "wrong kind":
        state["fc.weight"] = torch.ones(5, 6, dtype=torch.int64)
    elif how == "no data":
        state["fc.weight"] = torch.ones(5, 6, device="meta")
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 missing: stages\.1\.mix\.bias"),
        ("unexpected", r"1 unexpected: stages\.1\.mix\.scale"),
        ("misshapen", r"head\.weight expected \[5, 6\] float32, got \[7, 6\] float32"),
        ("wrong kind", r"head\.weight expected \[5, 6\] float32, got \[5, 6\] int64"),
        ("no data", r"got \[5, 6\] float32 without data"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(how, message):
    model = toy(1)
    before = copied(model)
    versions = {name: tensor._version for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load(model, broken(authors(toy(2)), how))
    assert same(copied(model), before)
    assert versions == {name: tensor._version for name, tensor in model.state_dict().items()}


def test_messages_show_a_few_names_and_count_the_rest():
    state = {f"x{i}": torch.ones(1) for i in range(20)}
    with pytest.raises(CheckpointError, match=r"20 unexpected: x0, x1, x2, x3, x4 and 15 more"):
        load(toy(), state)


def test_compare_reports_without_loading():
    model = toy(1)
    before = copied(model)
    state = copied(toy(2))
    state["head.weight"] = torch.ones(7, 6)
    state["extra.scale"] = state.pop("norm.bias")
    report = compare(state, model, {"extra.*": "not ours"})
    assert not report.whole
    assert report.missing == ("norm.bias",)
    assert report.misshapen == {"head.weight": ("[5, 6] float32", "[7, 6] float32")}
    assert report.ignored == {"extra.scale": "not ours"}
    assert "extra.scale (not ours)" in str(report)
    assert len(report.matched) == len(before) - 2
    assert same(copied(model), before)


def test_half_precision_weights_load_into_single_precision():
    model = toy(1)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in authors(toy(2)).items()
    }
    assert load(model, state).whole
    assert model.head.weight.dtype == torch.float32


def test_a_wrapped_model_takes_detectors_and_ignores_only_what_it_lists():
    source = toy(1)
    state = authors(source)
    norm = {"norm0.weight": torch.full((6,), 3.0), "norm0.bias": torch.full((6,), 4.0)}
    detector = {f"backbone.{name}": tensor for name, tensor in {**state, **norm}.items()}
    model = Wrapper()
    report = load(model, {"state_dict": {**detector, "neck.fpn.weight": torch.ones(1)}})
    assert report.ignored["neck.fpn.weight"] == "detector part, not backbone"
    assert report.ignored["norm.running_mean"] == "norm before the classifier"
    assert report.ignored["head.weight"] == "classifier"
    assert torch.equal(model.norm0.weight, norm["norm0.weight"])
    assert torch.equal(
        model.model.stages[2]["downsample"].weight, source.stages[2]["downsample"].weight
    )
    assert same(convert(model.state_dict(), model), model.state_dict())
    with pytest.raises(CheckpointError, match=r"missing: norm0\.weight, norm0\.bias"):
        load(Wrapper(), state)
    with pytest.raises(CheckpointError, match=r"unexpected: tail\.weight"):
        load(Wrapper(), {**state, **norm, "tail.weight": torch.ones(1)})


def test_a_model_with_a_backbone_of_its_own_keeps_that_prefix():
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    report = load(model, {name: tensor + 1 for name, tensor in model.state_dict().items()})
    assert len(report.matched) == 4
    assert not report.ignored


def nat(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("nat_atto")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


ZOO_WRAPS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 300},
    "ema": lambda state: {"state_dict": {}, "state_dict_ema": state},
    "module": lambda state: {"state_dict": {f"module.{name}": state[name] for name in state}},
}


@pytest.mark.parametrize("wrap", ZOO_WRAPS.values(), ids=ZOO_WRAPS.keys())
def test_a_zoo_model_is_created_from_an_authors_file(wrap, tmp_path):
    state = nat(1).state_dict()
    torch.save(wrap(state), tmp_path / "nat.pth")
    overlay = {"file": str(tmp_path / "nat.pth")}
    model = timm.create_model("nat_atto", pretrained=True, pretrained_cfg_overlay=overlay)
    assert same(copied(model), state)
    assert load(nat(2), tmp_path / "nat.pth").matched == tuple(state)


@pytest.mark.parametrize("how", ["missing", "unexpected", "misshapen", "page"])
def test_a_zoo_model_is_not_created_from_a_file_that_does_not_fit(how, tmp_path):
    state = dict(nat(1).state_dict())
    name = "levels.1.blocks.0.attn.rpb"
    if how == "missing":
        del state[name]
    elif how == "unexpected":
        name = "levels.9.blocks.0.attn.rpb"
        state[name] = torch.ones(1)
    elif how == "misshapen":
        state[name] = torch.ones(3, 3)
    path = tmp_path / "nat.pth"
    torch.save(state, path)
    if how == "page":
        name = "web page"
        path.write_text("<html>moved</html>")
    with pytest.raises(CheckpointError, match=name):
        timm.create_model("nat_atto", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    model = nat(2)
    before = copied(model)
    with pytest.raises(CheckpointError, match=name):
        load(model, path)
    assert same(copied(model), before)


@pytest.mark.parametrize("task", [None, "det", "seg"])
def test_a_feature_backbone_takes_classifiers_and_detectors(task, tmp_path):
    state = nat(1).state_dict()
    torch.save(state, tmp_path / "cls.pth")
    backbone = FeatureBackbone("nat_atto", task=task, checkpoint=tmp_path / "cls.pth")
    prefix = "model.model." if task is None else "model."
    name = "levels.2.blocks.1.attn.rpb"
    assert torch.equal(backbone.state_dict()[prefix + name], state[name])
    report = load(backbone, state)
    assert report.whole
    assert {"norm.weight", "head.weight", "head.bias"} <= report.ignored.keys()

    norms = {
        key.removeprefix(prefix): torch.randn_like(tensor)
        for key, tensor in backbone.state_dict().items()
        if key.startswith(prefix + "norm")
    }
    assert bool(norms) == (task is not None)
    dense = {key: state[key] for key in state if not key.startswith(("norm.", "head."))} | norms
    detector = {f"backbone.{key}": tensor for key, tensor in dense.items()}
    detector["roi_head.bbox_head.fc_cls.weight"] = torch.ones(3)
    torch.save({"meta": {"epoch": 36}, "state_dict": detector}, tmp_path / "det.pth")
    other = FeatureBackbone("nat_atto", task=task, checkpoint=tmp_path / "det.pth")
    for key, tensor in dense.items():
        assert torch.equal(other.state_dict()[prefix + key], tensor)
    assert load(other, tmp_path / "det.pth").ignored == {
        "roi_head.bbox_head.fc_cls.weight": "detector part, not backbone"
    }
    assert load(other, backbone.state_dict()).matched == tuple(backbone.state_dict())

    before = copied(other)
    del detector["backbone.levels.0.blocks.0.attn.rpb"]
    with pytest.raises(CheckpointError, match=r"1 missing: .*levels\.0\.blocks\.0\.attn\.rpb"):
        load(other, detector)
    assert same(copied(other), before)
