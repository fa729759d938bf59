import hashlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from attos import ATTOS, is_fixed
from hubs import Hub
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import vitarium_cli
from vitarium.backbones import nat
from vitarium.tools import export_hub

ROOT = Path(vitarium_cli.__file__).parent
DIGITS = "nat_atto.vitarium_digits"

# A fresh process. Each line of its input is a model's name for timm and a file with what the model
# must hold and give; each is answered by a line.
LOAD = """
import sys
import timm, torch
import vitarium

for line in sys.stdin:
    name, file = line.split()
    expected = torch.load(file)
    model = timm.create_model(name, pretrained=True).eval()
    assert model.state_dict().keys() == expected["weights"].keys(), name
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected["weights"][key]), (name, key)
    with torch.no_grad():
        assert torch.equal(model(expected["images"]), expected["logits"]), name
    print(name, flush=True)
"""


@contextmanager
def fresh(**variables):
    """A function that has a fresh process load a model, and returns what that process says."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
    )

    def load(name, file):
        process.stdin.write(f"{name} {file}\n")
        process.stdin.flush()
        said = []
        for line in process.stdout:
            if line == f"{name}\n":
                return "".join(said)
            said.append(line)
        raise AssertionError("".join(said))

    with process:
        yield load


def trained(name, tmp_path, **kwargs):
    """A checkpoint with weights that no initialisation gives, and what a model with them gives."""
    torch.manual_seed(3)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    height, width = kwargs.get("img_size", model.pretrained_cfg["input_size"][1:])
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        expected = {"weights": weights, "images": images, "logits": model(images)}
    save_file(weights, tmp_path / f"{name}.safetensors")
    torch.save(expected, tmp_path / f"{name}.pt")
    return tmp_path / f"{name}.safetensors", tmp_path / f"{name}.pt"


def test_every_family_comes_back_in_a_fresh_process(program, tmp_path):
    """Fixed sizes: another img_size, and another number of classes."""
    folders = []
    for name in ATTOS:
        kwargs = {"num_classes": 7, "img_size": (64, 96)} if is_fixed(name) else {}
        options = ("--num-classes", 7, "--img-size", "64x96") if kwargs else ()
        checkpoint, expected = trained(name, tmp_path, **kwargs)
        folder = tmp_path / "exported" / name
        result = program("export-hub", name, folder, "--checkpoint", checkpoint, *options)
        assert result.err == ""
        assert result.status == 0
        assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
        folders.append((folder, expected))
    assert any(map(is_fixed, ATTOS))
    assert not all(map(is_fixed, ATTOS))
    with fresh(HF_HUB_OFFLINE="1") as load:
        for folder, expected in folders:
            load(f"local-dir:{folder}", expected)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """nat_atto with weights of its own, exported; and what it must hold and give."""
    tmp_path = tmp_path_factory.mktemp("hub")
    checkpoint, expected = trained("nat_atto", tmp_path)
    status = vitarium_cli.main(
        ["export-hub", "nat_atto", str(tmp_path / "folder"), "--checkpoint", str(checkpoint)]
    )
    assert status == 0
    return tmp_path / "folder", expected


def test_a_hub_serves_the_folder_to_fresh_processes(exported, tmp_path):
    folder, expected = exported
    here = {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub = Hub({"someone/name": files})
    here["HF_ENDPOINT"] = hub.url
    with fresh(**here) as load:
        with hub:
            load("hf-hub:someone/name", expected)
            assert len(hub.weights()) == 2

            (blob,) = (tmp_path / "hub" / "models--someone--name" / "blobs").glob("?" * 64)
            content = bytearray(blob.read_bytes())
            content[-1] ^= 1
            blob.write_bytes(content)
            assert f"is now {blob}.bad" in load("hf-hub:someone/name@main", expected)
            assert len(hub.weights()) == 4
        load("hf-hub:someone/name", expected)  # the server is gone, and nobody says so
    with fresh(**here, HF_HUB_OFFLINE="1") as load:
        load("hf-hub:someone/name", expected)


def test_what_a_folder_holds(program, tmp_path):
    status, out, err = program("export-hub", "nat_atto", tmp_path / "x")
    assert (status, err) == (0, "")
    assert out == f"wrote {tmp_path / 'x'}: README.md, config.json, model.safetensors\n"
    model = timm.create_model("nat_atto", pretrained=True)
    held = load_file(tmp_path / "x" / "model.safetensors")
    assert held.keys() == model.state_dict().keys()
    assert all(torch.equal(held[key], tensor) for key, tensor in model.state_dict().items())
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("nat_atto", 10)
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3
    _, front, card = (tmp_path / "x" / "README.md").read_text().split("---\n")
    assert front.splitlines() == [
        *("tags:", "- image-classification", "- timm", "- vitarium"),
        *("pipeline_tag: image-classification", "library_name: timm", "license: apache-2.0"),
    ]
    assert card.startswith(f"# Model card for {DIGITS}\n")
    weight = nat._WEIGHTS[DIGITS]
    digest = hashlib.sha256((tmp_path / "x" / "model.safetensors").read_bytes()).hexdigest()
    for line in (
        "- **parameters:** 1,405,940",
        "- **GFLOPs:** 0.02 multiply-adds at 64 x 64",
        "- **classes:** 10",
        f"- **weights:** {weight.file}, which ships with vitarium, sha256 {weight.sha256}",
        "- **licence of the weights:** Apache-2.0",
        f"- **sha256 of model.safetensors:** {digest}",
        "import vitarium  # enters the architecture into timm's registry",
    ):
        assert line in card.splitlines()
    modes = {path.stat().st_mode for path in (tmp_path / "x").iterdir()}
    assert len(modes) == 1


def test_what_is_not_known_of_the_user_s_weights(exported):
    folder, _ = exported
    card = (folder / "README.md").read_text()
    assert "license: other\nlicense_name: none-stated\n---\n# Model card for nat_atto\n" in card
    assert "- **weights:** nat_atto.safetensors, sha256 " in card
    assert "top-1" not in card
    assert str(folder.parent) not in card
    assert "license" not in json.loads((folder / "config.json").read_text())["pretrained_cfg"]


def test_published_figures_and_licence_of_a_tag(monkeypatch, tmp_path):
    (tmp_path / "x").write_bytes(b"file")
    monkeypatch.setattr(export_hub, "fetch", lambda weight, name: tmp_path / "x")
    facts = export_hub._of_the_tag("nat_tiny.shi_in1k", None)
    assert facts["weights"].startswith("https://shi-labs.com/")
    assert facts["weights"].endswith(f", sha256 {hashlib.sha256(b'file').hexdigest()}")
    assert facts["published top-1"].startswith("83.2 % (README of SHI-Labs")
    resized = export_hub._of_the_tag("nat_tiny.shi_in1k", (384, 256))
    assert resized["weights"].endswith("; made for images of 384 x 256 here")
    assert resized["published top-1"] == "not stated"
    assert export_hub._licence("none stated", "https://x") == {
        "license": "other",
        "license_name": "none-stated",
        "license_link": "https://x",
    }


def test_classes_are_the_tag_s_and_not_the_entry_s():
    name = "fused_swin_large_patch4_window7_224.ms_in22k"
    cfg = timm.get_pretrained_cfg(name).to_dict()
    assert export_hub._network(name, cfg, {})["classes"] == str(cfg["num_classes"]) == "21841"


def test_sizes_that_the_model_takes(program, tmp_path):
    """A model for images of any size whose windows have a size."""
    checkpoint, _ = trained("fused_swin_atto", tmp_path, num_classes=3, img_size=(32, 96))
    folder = tmp_path / "x"
    argv = ("export-hub", "fused_swin_atto", folder, "--checkpoint", checkpoint)
    assert program(*argv, "--num-classes", 3, "--img-size", "32x96").err == ""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.num_classes == 3
    assert model.pretrained_cfg["input_size"] == (3, 32, 96)
    assert "at 32 x 96" in (folder / "README.md").read_text()
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
    assert again.num_classes == 5


def test_tables_are_not_resized_unasked(program, tmp_path):
    """A fine-tuned model's tables go into the folder as they are, or not at all."""
    checkpoint, _ = trained("agent_deit_atto", tmp_path, img_size=(96, 96))
    argv = ("export-hub", "agent_deit_atto", tmp_path / "x", "--checkpoint", checkpoint)
    status, _, err = program(*argv)
    assert status == 1
    assert "are resized on request only (--img-size" in err
    assert not (tmp_path / "x").exists()
    assert program(*argv, "--img-size", 96).err == ""
    tables = load_file(tmp_path / "x" / "model.safetensors")
    assert torch.equal(tables["pos_embed"], load_file(checkpoint)["pos_embed"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("resnet18",), "resnet18 is timm's own: timm.models.save_for_hf exports it"),
        (("nat_attto",), "unknown model 'nat_attto'; did you mean nat_atto"),
        (("nat_atto.x",), "unknown model 'nat_atto.x': expected nat_atto.vitarium_digits"),
        (("dinat_atto",), "no weights are known"),
        (("nat_atto", "--num-classes", "5"), "--num-classes: expected with --checkpoint only"),
        (("nat_atto", "--img-size", "64"), "--img-size: nat_atto.vitarium_digits takes images of"),
        (("nat_atto", "--checkpoint", "absent.pth"), "absent.pth: no such file"),
    ],
)
def test_errors(program, tmp_path, argv, words):
    name, *options = argv
    status, out, err = program("export-hub", name, tmp_path / "new" / "x", *options)
    assert (status, out) == (1, "")
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_folders(program, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "full/x"):
        err = program("export-hub", "nat_atto", tmp_path / name).err
        assert f"{tmp_path / name}: expected a new or an empty folder" in err
    held = (tmp_path / "empty").stat().st_ino
    assert program("export-hub", "nat_atto", tmp_path / "empty").err == ""
    assert len(list((tmp_path / "empty").iterdir())) == 3
    # It may be a volume, or where a shell is.
    assert (tmp_path / "empty").stat().st_ino == held
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize(
    ("error", "status"), [(SafetensorError("disk full"), 1), (KeyboardInterrupt(), 130)]
)
def test_nothing_is_left_half_written(program, tmp_path, monkeypatch, error, status):
    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(export_hub, "save_file", broken)
    result = program("export-hub", "nat_atto", tmp_path / "x")
    assert result.status == status
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").mkdir()
    assert program("export-hub", "nat_atto", tmp_path / "x").status == status
    assert [*tmp_path.rglob("*")] == [tmp_path / "x"]
