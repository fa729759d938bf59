"""`vitarium embed`: what is stored of each image; restarts, other processes, faults."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from vitarium.embedding import cluster
from vitarium.embedding.embedder import Embedder, Progress, Settings
from vitarium.embedding.images import open_images
from vitarium.heads.probing import FrozenBackbone
from vitarium.training.sources import UnreadableError

MODEL = "nat_atto.vitarium_digits"
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Seven images in folders, the third of which by name is none."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, name in enumerate(("b.png", "a/2.jpg", "a/10.JPG", "c/d/e.webp", "c/x.bmp", "z.png")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (40 + 5 * i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (root / "b.jpeg").write_bytes(b"no image")
    (root / "notes.txt").write_text("no image, and not asked to be one")
    return root


NAMES = ["a/10.JPG", "a/2.jpg", "b.png", "c/d/e.webp", "c/x.bmp", "z.png"]


@pytest.fixture
def embed(program, images, tmp_path):
    """Run the program on the images: three of them in a shard, two in a batch."""

    def run(*argv, data=images, out=tmp_path / "out", model=MODEL):
        return program(
            *("embed", "--model", model, "--data", data, "--out", out, "--shard-size", 3),
            *("--batch-size", 2, "--workers", 0, "--device", "cpu", *argv),
        )

    return run


@pytest.fixture(scope="module")
def expected(images):
    """What the model says of each image that can be read, one at a time."""
    model = timm.create_model(MODEL, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    inputs = [transform(Image.open(images / name).convert("RGB"))[None] for name in NAMES]
    with torch.inference_mode():
        features = [model.forward_features(x) for x in inputs]
        return {
            "pooled": torch.cat([model.forward_head(x, pre_logits=True) for x in features]),
            "tokens": torch.cat([FrozenBackbone(model)(x) for x in inputs]),
        }


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("shard-*"))


def contents(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in shards(out)]


def facts(path: Path) -> dict:
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["shard"])


def test_each_image_has_its_row(embed, expected, tmp_path):
    result = embed()
    assert result.status == 0
    assert result.out == f"6 embeddings, 1 images that cannot be read\nwrote {tmp_path / 'out'}\n"
    assert result.err == "cannot be read: b.jpeg: unknown format, damaged, or empty\n"
    paths = shards(tmp_path / "out")
    assert [path.name for path in paths] == [f"shard-00000{i}.safetensors" for i in range(3)]
    assert [facts(path)["names"] for path in paths] == [NAMES[:2], NAMES[2:5], NAMES[5:]]
    assert [facts(path)["failed"] for path in paths] == [
        [["b.jpeg", "unknown format, damaged, or empty"]], [], []
    ]  # fmt: skip
    rows = torch.cat([load_file(path)["embeddings"] for path in paths])
    torch.testing.assert_close(rows, expected["pooled"])


def test_tokens_in_parquet(embed, expected, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    assert embed("--what", "tokens", "--format", "parquet").status == 0
    tables = [pq.read_table(path) for path in shards(tmp_path / "out")]
    assert [name for table in tables for name in table["name"].to_pylist()] == NAMES
    rows = [row for table in tables for row in table["embedding"].to_pylist()]
    torch.testing.assert_close(torch.tensor(rows), expected["tokens"])


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_bfloat16(embed, expected, tmp_path, kind):
    if kind == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
    assert embed("--dtype", "bfloat16", "--format", kind).status == 0
    if kind == "parquet":  # which has no such type
        tables = [pq.read_table(path) for path in shards(tmp_path / "out")]
        rows = torch.tensor([x for table in tables for x in table["embedding"].to_pylist()])
        assert torch.equal(rows, rows.bfloat16().float())
    else:
        rows = torch.cat([load_file(path)["embeddings"] for path in shards(tmp_path / "out")])
        assert rows.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(rows.float(), expected["pooled"], dim=1)
    assert cosine.min() > 0.999


def test_a_restart_keeps_what_is_whole(embed, tmp_path):
    out = tmp_path / "out"
    embed()
    before, whole = contents(out), shards(out)
    whole[0].unlink()
    whole[1].write_bytes(before[1][:-1])
    whole[2].with_name(whole[2].name + ".new").write_bytes(b"half")
    last = whole[2].stat()
    with pytest.warns(UserWarning, match="shard-000001.safetensors is damaged"):
        result = embed("--batch-size", 2, "--workers", 1)
    assert result.status == 0
    assert "4 of 7 images are there already" in result.err
    assert contents(out)[:3] == before
    assert (shards(out)[2].stat().st_ino, shards(out)[2].stat().st_mtime_ns) == (
        last.st_ino, last.st_mtime_ns
    )  # fmt: skip


def test_a_shard_of_other_embeddings_does_not_count(embed, tmp_path):
    embed()
    embed("--dtype", "bfloat16", out=tmp_path / "other")
    before = contents(tmp_path / "out")
    shutil.copy(shards(tmp_path / "other")[2], shards(tmp_path / "out")[2])
    with pytest.warns(UserWarning, match="not of these embeddings"):
        embed()
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--dtype", "bfloat16"), "dtype was 'float32', is 'bfloat16'"),
        (("--what", "tokens"), "what was 'pooled', is 'tokens'"),
        (("--format", "parquet"), "format was 'safetensors', is 'parquet'"),
        (("--shard-size", 4), "shard_size was 3, is 4"),
        (("--model", "dinat_atto", "--checkpoint", "CHECKPOINT"), "model was 'nat_atto', is"),
    ],
)
def test_other_embeddings_do_not_go_into_the_same_folder(embed, tmp_path, argv, message):
    embed()
    before = contents(tmp_path / "out")
    if "CHECKPOINT" in argv:
        save_file(timm.create_model("dinat_atto").state_dict(), tmp_path / "dinat.safetensors")
        argv = (*argv[:-1], tmp_path / "dinat.safetensors")
    result = embed(*argv)
    assert result.status == 1
    assert message in result.err
    assert contents(tmp_path / "out") == before


def test_other_weights_or_images_do_not_either(embed, images, tmp_path):
    embed()
    model = timm.create_model(MODEL, pretrained=True)
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1e-3
    save_file(model.state_dict(), tmp_path / "changed.safetensors")
    assert "weights was" in embed("--checkpoint", tmp_path / "changed.safetensors").err
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    assert embed(data=moved).status == 0
    shutil.copy(moved / "b.png", moved / "c/x.bmp")
    assert "list was" in embed(data=moved).err
    (moved / "new.png").touch()
    assert "images was 7, is 8" in embed(data=moved).err


def test_a_checkpoint_of_any_number_of_classes(embed, expected, tmp_path):
    model = timm.create_model(MODEL, pretrained=True)
    model.reset_classifier(3)
    save_file(model.state_dict(), tmp_path / "three.safetensors")
    assert embed("--checkpoint", tmp_path / "three.safetensors").status == 0
    rows = torch.cat([load_file(path)["embeddings"] for path in shards(tmp_path / "out")])
    torch.testing.assert_close(rows, expected["pooled"])


def test_strict(embed, tmp_path):
    message = "b.jpeg: cannot read this image: unknown format"
    result = embed("--strict")
    assert result.status == 1
    assert message in result.err
    assert not shards(tmp_path / "out")
    assert embed().status == 0
    assert message in embed("--strict").err


def test_all_images_of_a_shard_may_be_unreadable(embed, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        (data / f"{i}.png").touch()
    (data / "5.png").symlink_to(tmp_path / "nowhere")
    assert embed(data=data).status == 0
    shapes = [load_file(path)["embeddings"].shape for path in shards(tmp_path / "out")]
    assert shapes == [(0, 256), (0, 256)]
    assert ["5.png", "No such file or directory"] in facts(shards(tmp_path / "out")[1])["failed"]
    assert embed(data=data).out.startswith("0 embeddings, 5 images")


def test_a_full_disk_leaves_what_was_finished(embed, tmp_path):
    out = tmp_path / "out"
    embed(out=tmp_path / "whole")
    sizes = [path.stat().st_size for path in shards(tmp_path / "whole")]
    assert sizes[0] < sizes[1]  # the first has a row less
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[1] - 1, before[1]))
    try:
        result = embed()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.status == 1
    assert "shard-000001.safetensors: cannot be written: File too large" in result.err
    assert [path.name for path in shards(out)] == ["shard-000000.safetensors"]
    assert embed().status == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_what_another_process_has_claimed_is_waited_for(embed, images, tmp_path):
    embed(out=tmp_path / "whole")
    settings = Settings(
        model=MODEL, data=str(images), out=str(tmp_path / "out"), shard_size=3, batch_size=2,
        workers=0, device="cpu",
    )  # fmt: skip
    embedder = Embedder(settings)
    claim = embedder.store.claim(1)
    found = []
    thread = threading.Thread(target=lambda: found.append(embedder.run()))
    thread.start()
    thread.join(3)
    assert thread.is_alive()
    assert [path.name[6:12] for path in shards(tmp_path / "out")] == ["000000", "000002"]
    claim.release()
    thread.join(60)
    assert [rows for rows, _ in found] == [6]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_processes_lose_and_repeat_nothing():
    pytest.importorskip("pyarrow")
    argv = [sys.executable, TESTS / "embed_storm.py", "--rounds", "2", "--kills", "2"]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 rounds right" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_launchers(embed, images, tmp_path, launcher):
    pytest.importorskip("accelerate")
    embed(out=tmp_path / "whole")
    options = ["--nproc_per_node", "2"]
    if launcher.startswith("accelerate"):
        options = ["--num_processes", "2", "--multi_gpu"]
    argv = [
        *(sys.executable, "-m", launcher, *options, "-m", "vitarium_cli", "embed"),
        *("--model", MODEL, "--data", images, "--out", tmp_path / "out", "--shard-size", "3"),
        *("--batch-size", "2", "--workers", "1", "--device", "cpu"),
    ]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("6 embeddings, 1 images") == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_ray_workers(embed, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps a token
    embed()
    before = contents(tmp_path / "out")
    for path in shards(tmp_path / "out")[:2]:
        path.unlink()
    result = embed("--ray", 2)
    assert result.status == 0, result.err
    assert result.out.startswith("6 embeddings, 1 images")
    assert "1 of 7 images are there already" in result.err
    assert "cannot be read: b.jpeg" in result.err
    assert contents(tmp_path / "out") == before


def test_what_goes_wrong_on_a_cluster_is_said_here(images, tmp_path):
    settings = Settings(
        model=MODEL, data=str(images), out=str(tmp_path / "out"), workers=0, device="cpu",
        strict=True,
    )  # fmt: skip
    row = cluster.Actor(settings)({"shard": 0})
    assert row["error"].startswith("b.jpeg: cannot read this image")


def test_tar_files(embed, images, tmp_path):
    embed()
    for name, members in (("1.tar", NAMES[:4]), ("2.tar", [*NAMES[4:], "b.jpeg", "notes.txt"])):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in members:
                tar.add(images / member, member)
    assert embed(data=tmp_path / "*.tar", out=tmp_path / "tars").status == 0
    found = dict(rows(tmp_path / "tars"))
    assert [*found] == [f"1.tar/{x}" for x in NAMES[:4]] + [f"2.tar/{x}" for x in NAMES[4:]]
    for name, row in rows(tmp_path / "out"):
        tar = 1 + (name in NAMES[4:])
        torch.testing.assert_close(found[f"{tar}.tar/{name}"], row)
    (tmp_path / "3.tar").write_bytes(b"no tar")
    assert "3.tar is damaged" in embed(data=tmp_path / "*.tar", out=tmp_path / "more").err


def rows(out: Path) -> list[tuple[str, torch.Tensor]]:
    found = []
    for path in shards(out):
        found += zip(facts(path)["names"], load_file(path)["embeddings"], strict=True)
    return found


def test_links_are_followed_and_end(images, tmp_path):
    (tmp_path / "linked").symlink_to(images)
    (tmp_path / "loop").symlink_to(tmp_path)
    names = open_images(str(tmp_path)).names
    assert [*names] == [f"linked/{name}" for name in sorted([*NAMES, "b.jpeg"])]
    assert names[2:4] == ["linked/b.jpeg", "linked/b.png"]


def test_a_name_need_not_be_text(embed, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (40, 40)).save(data / "x.png")
    try:
        os.rename(data / "x.png", os.fsencode(data) + b"/\xff.png")
    except OSError:
        pytest.skip("the file system takes text only")
    assert embed(data=data).status == 0
    assert facts(shards(tmp_path / "out")[0])["names"] == ["\udcff.png"]
    assert embed("--format", "parquet", data=data, out=tmp_path / "table").status == 0
    assert pq.read_table(shards(tmp_path / "table")[0])["name"].to_pylist() == ["\\udcff.png"]


def test_data_sets_with_names(images, tmp_path):
    pytest.importorskip("sklearn")
    datasets = pytest.importorskip("datasets")
    digits = open_images("digits", split="val")
    assert len(digits) == 360
    assert digits.load(0).size == (8, 8)
    paths = [str(images / name) for name in ("b.png", "b.jpeg", "z.png")]
    table = datasets.Dataset.from_dict({"picture": paths})  # without targets
    table = table.cast_column("picture", datasets.Image())
    datasets.DatasetDict(test=table).save_to_disk(tmp_path / "table")
    found, again = (
        open_images("hf/disk", root=str(tmp_path / "table"), split="test") for _ in range(2)
    )
    assert found.digest == again.digest
    assert [*found.names] == [f"hf/disk test {i}" for i in range(3)]
    assert np.array_equal(found.load(0), Image.open(images / "b.png"))
    with pytest.raises(UnreadableError):
        found.load(1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "nat_ato"), "unknown model 'nat_ato'; did you mean nat_atto"),
        (("--data", "nowhere"), "--data: expected a folder, a pattern of tar files, digits"),
        (("--data", "nowhere/*.tar"), "--data: expected images in nowhere/*.tar, found none"),
        (("--data", "EMPTY"), "found none"),
        (("--split", "val"), "--split: "),
        (("--data", "digits"), "--split: expected one of digits, got none"),
        (("--data", "digits", "--split", "test"), "expected train or val, got 'test'"),
        (("--data", "torchvision/mnist", "--split", "test"), "--root: expected the folder of"),
        (("--data", "hf/disk", "--split", "x", "--root", "no"), "--root: expected a folder"),
        (("--out", "FULL"), "--out: expected embeddings, or an empty folder"),
        (("--device", "nowhere"), "device: 'nowhere' cannot be used here"),
    ],
)
def test_bad_input_is_one_line(embed, images, tmp_path, argv, message):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "FULL": images}
    result = embed(*(places.get(x, x) for x in argv))
    assert result.status == 1
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (images / ".claims").exists()


def test_numbers_are_checked_before_anything_runs(embed):
    for option, value in (("--shard-size", "0"), ("--batch-size", "x"), ("--workers", "-1")):
        with pytest.raises(SystemExit):
            embed(f"{option}={value}")


def test_progress(capsys, monkeypatch):
    now, done = [0.0], [20]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(lambda: done[0], 100)
    for now[0] in (1.0, 29.0, 31.0, 40.0):
        progress.tell(5)
    now[0], done[0] = 62.0, 80
    progress.tell(2)
    progress.end()
    assert capsys.readouterr().err.splitlines() == [
        "20 of 100 images are there already",
        "25/100 images  0.1613 images/s  0:07:45 left",
        "82/100 images  1 images/s  0:00:18 left",
    ]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress(lambda: done[0], 100)
    now[0] = 72.0
    progress.tell(10)
    progress.say("a line that stays")
    progress.end()
    assert capsys.readouterr().err.split("\x1b[K")[1:] == [
        "\n\r90/100 images  1 images/s  0:00:10 left", "\ra line that stays", "\n\r", ""
    ]  # fmt: skip
