import csv
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg

from vitarium.checkpoints import load
from vitarium.tools.predict import label_names


@pytest.fixture(scope="module")
def expected(checkpoint, photo):
    """Probabilities of the photo's classes, by hand."""
    model = timm.create_model("nat_atto").eval()
    load(model, checkpoint)
    transform = create_transform(**resolve_model_data_config(model))
    with torch.inference_mode():
        return model(transform(Image.open(photo))[None]).softmax(-1)[0]


def test_json(program, checkpoint, photo, expected):
    result = program(
        *("predict", photo, "--model", "nat_atto", "--checkpoint", checkpoint, "--topk", 3),
        *("--json", "--device", "cpu"),
    )
    assert (result.status, result.err) == (0, "")
    (row,) = json.loads(result.out)
    assert row["image"] == str(photo)
    values, indices = expected.topk(3)
    assert [p["index"] for p in row["predictions"]] == indices.tolist()
    assert [p["label"] for p in row["predictions"]] == [str(i) for i in indices.tolist()]
    found = torch.tensor([p["probability"] for p in row["predictions"]])
    torch.testing.assert_close(found, values)


def test_text_and_csv_hold_the_same(program, checkpoint, photo, expected, tmp_path):
    path = tmp_path / "rows.csv"
    status, out, err = program(
        *("predict", photo, "--model", "nat_atto", "--checkpoint", checkpoint, "--topk", 99),
        *("--csv", path, "--device", "cpu"),
    )
    assert (status, err) == (0, "")
    head, *rows = csv.reader(path.open(encoding="utf-8"))
    assert head == ["image", "rank", "index", "label", "probability"]
    assert [row[:2] for row in rows] == [[str(photo), str(rank)] for rank in range(1, 11)]
    assert sum(float(row[4]) for row in rows) == pytest.approx(1)
    assert [int(row[2]) for row in rows] == expected.argsort(descending=True).tolist()
    name, *lines, wrote = out.splitlines()
    assert name == str(photo)
    assert [line.split() for line in lines] == [[f"{float(r[4]):.2%}", r[3]] for r in rows]
    assert wrote == f"wrote {path}"


def test_good_images_are_predicted_beside_bad_ones(program, checkpoint, photo, tmp_path):
    data = photo.read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    images = [tmp_path / "cut.png", photo, tmp_path, tmp_path / "empty.png", photo, "none.png"]
    arguments = ("predict", *images, "--model", "nat_atto", "--checkpoint", checkpoint)
    status, out, err = program(*arguments, "--topk", 1)
    assert status == 1
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [str(photo)] * 2
    assert len(out.splitlines()) == 4
    lines = err.splitlines()
    assert [line.split(": ")[:3] for line in lines] == [
        ["vitarium", "error", str(images[index])] for index in (0, 2, 3, 5)
    ]
    status, out, err = program(*arguments, "--json")
    assert status == 1
    assert err.splitlines() == lines
    assert ["error" in row for row in json.loads(out)] == [True, False, True, True, False, True]


def test_unusable_models_devices_and_outputs(program, checkpoint, photo, tmp_path):
    def refused(*argv):
        status, out, err = program("predict", photo, *argv)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        return err.removeprefix("vitarium: error: ").removesuffix("\n")

    assert refused("--model", "nat_att").startswith(
        "unknown model 'nat_att'; did you mean nat_atto, "
    )
    assert refused("--model", "convnext_tny").startswith(
        "unknown model 'convnext_tny'; did you mean convnext_tiny, "
    )
    assert refused("--model", "nat_atto.in1k") == (
        "unknown model 'nat_atto.in1k': expected nat_atto.vitarium_digits"
    )
    assert refused("--model", "vit_tiny_patch16_224.nope").startswith(
        "unknown model 'vit_tiny_patch16_224.nope': expected vit_tiny_patch16_224.augreg_in21k"
    )
    cfgs = {name: get_pretrained_cfg(name) for name in timm.list_models("vit_*")}
    without = next(name for name, cfg in cfgs.items() if not cfg.has_weights)
    assert refused("--model", without) == (
        f"{without} has no pretrained weights; give others with --checkpoint"
    )
    features_only = next(name for name, cfg in cfgs.items() if cfg.num_classes == 0)
    assert refused("--model", features_only, "--checkpoint", checkpoint) == (
        f"{features_only} has no classifier"
    )
    model = ("--model", "nat_atto", "--checkpoint")
    assert refused(*model, tmp_path / "x.pth") == f"{tmp_path / 'x.pth'}: no such file"
    assert refused(*model, photo).startswith(f"{photo}: expected safetensors or a PyTorch")
    assert refused(*model, checkpoint, "--device", "abacus").startswith(
        "device: 'abacus' cannot be used here: "
    )
    missing = tmp_path / "no" / "rows.csv"
    assert refused(*model, checkpoint, "--csv", missing) == f"{missing}: No such file or directory"
    assert refused(*model, checkpoint, "--csv", tmp_path) == f"{tmp_path}: Is a directory"


def test_a_checkpoint_of_another_model_is_refused(program, checkpoint, photo):
    status, out, err = program("predict", photo, "--model", "nat_tiny", "--checkpoint", checkpoint)
    assert (status, out) == (1, "")
    assert err.startswith(f"vitarium: error: {checkpoint} does not fit NAT: nothing was loaded. ")
    assert "head.weight expected [1000, 512] float32, got [10, 256] float32" in err
    assert err.count("\n") == 1


def test_a_timm_model(program, photo, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    status, out, err = program(
        *("predict", photo, "--model", "test_vit", "--checkpoint", tmp_path / "vit.safetensors"),
        *("--json", "--topk", 2),
    )
    assert (status, err) == (0, "")
    found = json.loads(out)[0]["predictions"]
    names = label_names(model)
    assert [p["label"] for p in found] == [names[p["index"]] for p in found]
    assert names[340] == "zebra"


def test_label_names_come_from_the_weights_first():
    cfg = {"label_names": ["cat", "n2"], "label_descriptions": {"n2": "dog"}, "num_classes": 2}
    assert label_names(SimpleNamespace(num_classes=2, pretrained_cfg=cfg)) == ["cat", "dog"]
    assert label_names(SimpleNamespace(num_classes=3, pretrained_cfg=cfg)) == ["0", "1", "2"]
    assert len(label_names(SimpleNamespace(num_classes=21841, pretrained_cfg={}))) == 21841
