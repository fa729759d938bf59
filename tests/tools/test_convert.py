"""`vitarium convert`: every family both ways, wrappers, resizing, cards, nothing half-written."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from attos import ATTOS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vitarium_cli
from vitarium import checkpoints
from vitarium.backbones._registry import entries
from vitarium.checkpoints import CheckpointError, Weight, cards, conversion
from vitarium.heads.features import FeatureBackbone

DENSE = [
    name
    for name in ATTOS
    if hasattr(entries()[name], "dense_adapter")
    and "dense form" not in getattr(entries()[name], "_LIMITS", {}).get(name, ())
]


def weights(model, seed=0):
    """Values of every tensor that no rule could guess, as long as shapes and kinds stay."""
    torch.manual_seed(seed)
    return {
        name: torch.randn_like(x) if x.is_floating_point() else torch.randint_like(x, 1, 99)
        for name, x in model.state_dict().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(obj, path):
    torch.save(obj, path)
    return path


@pytest.mark.parametrize("name", ATTOS)
def test_to_the_authors_layout_and_back_is_bit_equal(name, program, tmp_path):
    model = timm.create_model(name)
    ours = weights(model)
    start, theirs, back = (tmp_path / f for f in ("a.safetensors", "b.pth", "c.safetensors"))
    save_file(ours, start)
    assert program("convert", name, start, theirs, "--to", "authors").status == 0
    constants = entries()[name]._BUFFERS(model)
    found = checkpoints.unwrap(torch.load(theirs, weights_only=True))
    assert found.keys() == {*entries()[name]._RENAMES.to_authors(ours), *constants}
    assert same({key: found[key] for key in constants}, constants)
    assert program("convert", name, theirs, back).status == 0
    assert same(load_file(back), ours)
    dropped = json.loads(back.with_suffix(".json").read_text())["dropped"]
    assert dropped == dict.fromkeys(constants, "stored constant, computed here")


@pytest.mark.parametrize("name", DENSE)
def test_a_detector_s_backbone_goes_both_ways(name, program, tmp_path):
    ours = weights(FeatureBackbone(name, task="det"))
    start, theirs, back = (tmp_path / f for f in ("a.safetensors", "b.pth", "c.safetensors"))
    save_file(ours, start)
    det = ("--task", "det")
    assert program("convert", name, start, theirs, "--to", "authors", *det).status == 0
    detector = torch.load(theirs, weights_only=True)
    assert detector.keys() == {"state_dict"}
    assert all(key.startswith("backbone.") for key in detector["state_dict"])
    output = json.loads(theirs.with_suffix(".json").read_text())["output"]
    assert output["wrapper"] == ["state_dict", "backbone."]
    detector["state_dict"]["neck.lateral.weight"] = torch.zeros(3)
    assert program("convert", name, saved(detector, theirs), back, *det).status == 0
    assert same(load_file(back), ours)
    card = json.loads(back.with_suffix(".json").read_text())
    assert card["task"] == "det"
    assert card["source"]["wrapper"] == ["state_dict", "backbone."]
    assert card["dropped"].pop("neck.lateral.weight") == "detector part, not backbone"
    assert set(card["dropped"].values()) <= {"stored constant, computed here"}


@pytest.mark.parametrize("name", ["nat_atto", "dinat_atto"])
def test_transformers_layout_goes_both_ways(name, program, tmp_path):
    ours = weights(timm.create_model(name))
    start, theirs, back = (tmp_path / f for f in ("a.pth", "b.safetensors", "c.safetensors"))
    torch.save({"state_dict": {f"module.{key}": x for key, x in ours.items()}}, start)
    assert program("convert", name, start, theirs, "--to", "transformers").status == 0
    card = json.loads(theirs.with_suffix(".json").read_text())
    assert card["source"]["wrapper"] == ["state_dict", "module."]
    family = name.partition("_")[0]
    assert f"{family}.encoder.levels.0.layers.0.attention.self.query.weight" in load_file(theirs)
    result = program("convert", name, theirs, back, "--json")
    assert same(load_file(back), ours)
    assert json.loads(result.out)["dropped"] == {}
    report = json.loads(program("convert", name, theirs, back, "--dry-run", "--json").out)
    parts = report["renamed"]["levels.0.blocks.0.attn.qkv.weight"]
    assert [part.split(".")[-2] for part in parts] == ["query", "key", "value"]
    assert report["resized"] == {}


def test_the_card_tells_where_the_tensors_come_from(program, tmp_path):
    model = timm.create_model("fused_swin_atto")
    renames = entries()["fused_swin_atto"]._RENAMES
    source = saved({"model": renames.to_authors(weights(model)), "epoch": 3}, tmp_path / "swin.pth")
    out = tmp_path / "swin.safetensors"
    status, text, err = program("convert", "fused_swin_atto", source, out)
    assert (status, err) == (0, "")
    assert f"wrote {out}" in text
    card = json.loads((tmp_path / "swin.json").read_text())
    assert card["source"] == {
        "file": "swin.pth",
        "size": source.stat().st_size,
        "sha256": sha256(source),
        "wrapper": ["model"],
    }
    assert card["output"] == {
        "file": "swin.safetensors",
        "size": out.stat().st_size,
        "sha256": sha256(out),
        "wrapper": [],
    }
    assert card["format"] == cards.CARD_FORMAT
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["tensors"] == len(model.state_dict())
    assert card["licence"]["code"] == "MIT"
    assert card["versions"]["torch"] == torch.__version__
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "source_sha256": sha256(source)}
    assert {path.name for path in tmp_path.iterdir()} == {
        "swin.pth",
        "swin.safetensors",
        "swin.json",
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_same_file_gives_the_same_bytes(suffix, program, tmp_path):
    source = saved(weights(timm.create_model("vitrpb_atto")), tmp_path / "in.pt")
    hashes = set()
    for i in range(4):
        out = tmp_path / f"out{i}{suffix}"
        program("convert", "vitrpb_atto", source, out, "--to", "authors")
        hashes.add(sha256(out))
    assert len(hashes) == 1


def test_a_tag_tells_its_licence_and_size(program, tmp_path):
    source = tmp_path / "in.safetensors"
    save_file(weights(timm.create_model("nat_atto")), source)
    out = tmp_path / "out.safetensors"
    program("convert", "nat_atto.vitarium_digits", source, out)
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["tag"] == "vitarium_digits"
    assert card["licence"] == {
        "code": "MIT",
        "weights": "Apache-2.0",
        "stated_for": ["nat_atto.vitarium_digits"],
    }
    assert program("convert", "nat_atto.digits", source, out).err.startswith(
        "vitarium: error: entry: expected nat_atto or one of"
    )


def test_a_tag_tells_the_task_and_the_wrapper(program, tmp_path, monkeypatch):
    known = entries()["nat_atto"]._WEIGHTS
    why = "made up for a test"
    detector = Weight(unreleased=why, task="det", licence="X", code_licence="Y")
    monkeypatch.setitem(known, "nat_atto.me_coco", detector)
    monkeypatch.setitem(known, "nat_atto.me_in1k", Weight(unreleased=why, wrapper="state_dict"))
    dense = weights(FeatureBackbone("nat_atto", task="det"))
    source = tmp_path / "in.safetensors"
    save_file({f"backbone.{key.removeprefix('model.')}": x for key, x in dense.items()}, source)
    out = tmp_path / "out.safetensors"
    assert program("convert", "nat_atto.me_coco", source, out).status == 0
    assert same(load_file(out), dense)
    licence = {"code": "Y", "weights": "X", "stated_for": ["nat_atto.me_coco"]}
    assert json.loads(out.with_suffix(".json").read_text())["licence"] == licence
    assert program("convert", "nat_atto", source, out, "--task", "det").status == 0
    assert json.loads(out.with_suffix(".json").read_text())["licence"] == licence

    ours = weights(timm.create_model("nat_atto"))
    save_file(ours, source)
    theirs = tmp_path / "theirs.pth"
    assert program("convert", "nat_atto.me_in1k", source, theirs, "--to", "authors").status == 0
    assert torch.load(theirs).keys() == {"state_dict"}
    assert json.loads(theirs.with_suffix(".json").read_text())["output"]["wrapper"] == [
        "state_dict"
    ]
    assert program("convert", "nat_atto", source, out).status == 0
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["licence"]["weights"] == "Apache-2.0 or none stated"
    assert card["licence"]["stated_for"] == ["nat_atto.vitarium_digits", "nat_atto.me_in1k"]


def test_a_released_file_is_known_by_its_hash(program, tmp_path):
    packaged = Path(timm.get_pretrained_cfg("nat_atto").file)
    out = tmp_path / "out.safetensors"
    assert program("convert", "nat_atto", packaged, out).status == 0
    assert json.loads(out.with_suffix(".json").read_text())["tag"] == "vitarium_digits"
    assert same(load_file(out), load_file(packaged))


def test_the_classifier_has_as_many_classes_as_the_file(program, tmp_path):
    ours = weights(timm.create_model("nat_atto", num_classes=3))
    source = saved(ours, tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    assert program("convert", "nat_atto", source, out).status == 0
    assert same(load_file(out), ours)
    assert program("convert", "nat_atto", source, out, "--num-classes", "3").status == 0
    assert "head.weight" in program("convert", "nat_atto", source, out, "--num-classes", "4").err
    assert program("convert", "nat_atto", source, out, "--num-classes", "0").status == 0
    assert load_file(out).keys() == ours.keys() - {"head.weight", "head.bias"}
    dropped = json.loads(out.with_suffix(".json").read_text())["dropped"]
    assert dropped == dict.fromkeys(("head.weight", "head.bias"), "no classifier is asked for")


def test_averaged_weights_are_preferred_and_a_wrapper_can_be_named(program, tmp_path):
    model = timm.create_model("dinat_s_atto")
    plain, averaged = weights(model, 1), weights(model, 2)
    source = saved({"model": plain, "model_ema": averaged}, tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    program("convert", "dinat_s_atto", source, out)
    assert same(load_file(out), averaged)
    program("convert", "dinat_s_atto", source, out, "--wrapper", "model")
    assert same(load_file(out), plain)
    result = program("convert", "dinat_s_atto", source, out, "--wrapper", "net")
    assert (result.status, "wrapper: expected plain or one of" in result.err) == (1, True)


def test_what_does_not_fit_is_reported_and_writes_nothing(program, tmp_path):
    ours = weights(timm.create_model("nat_atto"))
    ours["strange"] = ours.pop("norm.weight")
    ours["norm.bias"] = torch.zeros(7)
    source = saved(ours, tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    for dry in ([], ["--dry-run"]):
        status, text, err = program("convert", "nat_atto", source, out, "--json", *dry)
        assert status == 1
        assert "does not fit nat_atto" in err
        assert err.count("\n") == 1
        report = json.loads(text)
        assert report["fits"] is False
        assert report["missing"] == ["norm.weight"]
        assert report["unexpected"] == ["strange"]
        assert report["misshapen"] == {
            "norm.bias": {"expected": "[256] float32", "got": "[7] float32"}
        }
        assert program("convert", "nat_atto", source, out, *dry).out.count("missing") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_what_does_not_fit_is_reported_for_other_layouts_too(program, tmp_path):
    ours = weights(timm.create_model("nat_atto", layer_scale=0.1))
    lost = {key: x for key, x in ours.items() if not key.endswith(".gamma2")}
    source = saved(lost, tmp_path / "in.pth")
    for to in ("authors", "transformers"):
        status, out, err = program("convert", "nat_atto", source, tmp_path / "o.pth", "--to", to)
        assert (status, "does not fit nat_atto" in err) == (1, True)
        assert "levels.0.blocks.0.gamma1" in out


def test_a_dry_run_says_what_would_happen(program, tmp_path):
    swin = entries()["agent_swin_atto"]._BUFFERS(timm.create_model("agent_swin_atto"))
    source = saved(
        {"model": {**weights(timm.create_model("agent_swin_atto")), **swin}}, tmp_path / "in.pth"
    )
    out = tmp_path / "out.safetensors"
    status, text, err = program("convert", "agent_swin_atto", source, out, "--dry-run")
    assert (status, err) == (0, "")
    assert "found around the tensors: model" in text
    assert f"{next(iter(swin))}: stored constant, computed here" in text
    assert list(tmp_path.iterdir()) == [source]


def test_a_detector_without_its_task_is_pointed_at_it(program, tmp_path):
    found = weights(FeatureBackbone("nat_atto", task="det").model)
    source = saved({f"backbone.{key}": x for key, x in found.items()}, tmp_path / "in.pth")
    result = program("convert", "nat_atto", source, tmp_path / "out.safetensors")
    assert result.status == 1
    assert "a detector's backbone needs a task, det or seg" in result.err


@pytest.mark.parametrize("name", ["biformer_atto", "fused_davit_atto"])
def test_norms_that_a_classifier_lacks_hold_what_the_model_begins_with(name, program, tmp_path):
    ours = weights(timm.create_model(name))
    counters = {key for key in ours if key.endswith("num_batches_tracked")}
    source = saved(
        {key: x.half() for key, x in ours.items() if key not in counters}, tmp_path / "in.pth"
    )
    out = tmp_path / "out.safetensors"
    assert program("convert", name, source, out, "--task", "seg").status == 0
    expected = FeatureBackbone(name, task="seg")
    begins = expected.state_dict()
    checkpoints.load(expected, out)
    found = load_file(out)
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["initialised"]
    for key in card["initialised"]:
        assert torch.equal(found[key].to(begins[key].dtype), begins[key])
    kinds = {x.dtype for x in found.values() if x.is_floating_point()}
    assert kinds == {torch.float16}
    head = {key for key in ours if key.startswith(("head.", "norm."))} - counters
    assert set(card["dropped"]) == head


SIZED = ["agent_deit_atto", "agent_pvt_atto", "agent_swin_atto", "vitrpb_atto"]


@pytest.mark.parametrize("name", SIZED)
def test_tables_are_resized_when_another_size_is_asked_for(name, program, tmp_path):
    size = (96, 128)
    source = saved(weights(timm.create_model(name)), tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    assert program("convert", name, source, out, "--img-size", "96x128").status == 0
    expected = timm.create_model(name, img_size=size)
    converted = checkpoints.convert(torch.load(source), expected)
    assert same(load_file(out), {key: converted[key] for key in expected.state_dict()})
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["img_size"] == [96, 128]
    old = torch.load(source)
    changed = {key for key, x in load_file(out).items() if x.shape != old[key].shape}
    assert changed
    assert card["resized"].keys() == changed
    for key, change in card["resized"].items():
        assert change["from"] == list(old[key].shape)
        assert change["to"] == list(load_file(out)[key].shape)
        assert change["rule"] in ("linear", "bicubic")


@pytest.mark.parametrize("name", ["agent_deit_atto", "agent_pvt_atto"])
def test_as_many_positions_of_another_form_are_resized(name, program, tmp_path):
    """64 x 64 and 32 x 128 pixels give maps of as many tokens."""
    ours = weights(timm.create_model(name))
    source, out = saved(ours, tmp_path / "in.pth"), tmp_path / "out.safetensors"
    assert program("convert", name, source, out, "--img-size", "32x128").status == 0
    model = timm.create_model(name)
    model.load_state_dict(ours)
    model.set_input_size((32, 128))
    found = load_file(out)
    resized = json.loads(out.with_suffix(".json").read_text())["resized"]
    tables = [key for key in ours if key.startswith("pos_embed")]
    for key in tables:
        assert found[key].shape == ours[key].shape
        torch.testing.assert_close(found[key], model.state_dict()[key])
        assert not torch.equal(found[key], ours[key])
    assert resized.keys() >= {*tables}


def test_tables_are_not_resized_unasked(program, tmp_path):
    source = saved(weights(timm.create_model("vitrpb_atto", img_size=96)), tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    status, text, err = program("convert", "vitrpb_atto", source, out, "--json")
    assert status == 1
    assert "--img-size, or convert's --resize" in err
    assert json.loads(text)["resized"]
    assert not out.exists()
    assert program("convert", "vitrpb_atto", source, out, "--resize").status == 0
    assert program("convert", "vitrpb_atto", out, source.with_suffix(".safetensors")).status == 0


def test_windows_of_another_size_are_resized_on_request(program, tmp_path):
    old = weights(timm.create_model("nat_atto", kernel_size=(9, 5, 3, 3)))
    source = saved(old, tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    assert program("convert", "nat_atto", source, out).status == 1
    assert program("convert", "nat_atto", source, out, "--resize").status == 0
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["resized"]["levels.0.blocks.0.attn.rpb"] == {
        "from": [1, 17, 17],
        "to": [1, 13, 13],
        "rule": "bicubic",
    }


def test_every_family_that_resizes_states_its_rule():
    """A table of another shape that a filter resizes has a rule in its family."""
    for name in ("fused_swin_atto", "agent_swin_atto"):
        model = timm.create_model(name)
        found = weights(model)
        table = next(key for key in found if key.endswith("relative_position_bias_table"))
        heads = found[table].shape[1]
        found[table] = torch.randn(121, heads)
        planned = conversion.plan(name, found)
        assert planned.fault is not None
        assert planned.resized.keys() == {table}
        assert planned.resized[table].rule != "none stated"
        assert planned.resized[table].before == (121, heads)
        assert conversion.plan(name, found, resize=True).fault is None


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("nat_atto", "64", "no tensor of nat_atto depends on the size of images"),
        ("dinat_isotropic_atto", "64", "has the same tensors for all images of 64 x 64"),
        ("fused_swinv2_atto", "64", "has the same tensors for all images of 64 x 64"),
        ("fused_davit_atto", "64", "no tensor of fused_davit_atto depends"),
        ("vitrpb_atto", "65", "img_size: expected one or two sides"),
    ],
)
def test_a_size_that_changes_nothing_is_refused(name, size, message, program, tmp_path):
    out = tmp_path / "out.safetensors"
    result = program("convert", name, tmp_path / "in.pth", out, "--img-size", size)
    assert result.status == 1
    assert message in result.err


def test_a_size_may_change_constants_alone(program, tmp_path):
    name = "fused_swin_atto"
    source = saved(weights(timm.create_model(name)), tmp_path / "in.pth")
    out, size = tmp_path / "out.pth", ("--img-size", "128")
    assert program("convert", name, source, out, "--to", "authors", *size).status == 0
    found = checkpoints.unwrap(torch.load(out))
    expected = entries()[name]._BUFFERS(timm.create_model(name, img_size=128))
    assert same({key: found[key] for key in expected}, expected)


def test_shared_memory_is_copied_where_it_must_be(program, tmp_path):
    ours = weights(timm.create_model("nat_atto"))
    both = torch.randn(len(ours["norm.weight"]))
    ours["norm.weight"] = ours["norm.bias"] = both  # one tensor, two names
    halves = torch.randn(2, len(ours["head.bias"]))
    ours["head.bias"] = halves[1]  # a part of more
    ours["head.weight"] = ours["head.weight"].t().contiguous().t()
    source = saved(ours, tmp_path / "in.pth")
    for suffix in (".safetensors", ".pth"):
        out = tmp_path / f"out{suffix[1]}{suffix}"
        assert program("convert", "nat_atto", source, out, "--to", "authors").status == 0
        found = checkpoints.read(out)
        assert same(found, ours)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in found.values())
        assert all(x.is_contiguous() for x in found.values())


def test_only_what_must_be_copied_is():
    x = torch.randn(4, 6)
    tensors = {"a": x, "b": x[1:3], "c": x.t(), "d": torch.randn(2), "e": torch.zeros(0)}
    found = cards._separate(tensors, whole=False)
    assert same(found, tensors)
    memory = {name: y.data_ptr() for name, y in found.items()}
    assert memory["a"] == x.data_ptr()
    assert memory["d"] == tensors["d"].data_ptr()
    assert memory["b"] != x[1:3].data_ptr()
    parts = dict(zip("abc", torch.randn(6, 2).chunk(3), strict=True))
    kept = cards._separate(parts, whole=False)
    assert all(kept[name].data_ptr() == parts[name].data_ptr() for name in parts)
    copied = cards._separate(parts, whole=True)
    assert all(y.untyped_storage().nbytes() == y.nbytes for y in copied.values())


def ready(tmp_path):
    return saved(weights(timm.create_model("nat_atto")), tmp_path / "in.pth")


@pytest.mark.parametrize(
    ("out", "more", "message"),
    [
        ("out.pth", [], "expected a name that ends with .safetensors"),
        ("out", ["--to", "authors"], "expected a name that ends with .safetensors or .pth"),
        ("no/out.safetensors", [], "no such folder"),
        ("folder.safetensors", [], "expected a file, got a folder"),
        ("in.pth", ["--to", "authors"], "expected another file than the checkpoint itself"),
        ("link.pth", ["--to", "authors"], "expected another file than the checkpoint itself"),
        ("notes.safetensors", [], "notes.json, where the card goes, exists and is not that"),
        ("other.safetensors", [], "exists and is not that of other.safetensors"),
        ("out.safetensors", ["--task", "det", "--num-classes", "3"], "expected None with a task"),
    ],
)
def test_places_that_are_refused(out, more, message, program, tmp_path):
    source = ready(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.pth").symlink_to(source)
    card = {"format": cards.CARD_FORMAT, "output": {"file": "other.pth"}}
    (tmp_path / "other.json").write_text(json.dumps(card))
    (tmp_path / "notes.json").write_text('{"my": "notes"}')
    before = {path: path.is_file() and sha256(path) for path in tmp_path.iterdir()}
    status, _, err = program("convert", "nat_atto", source, tmp_path / out, *more)
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert {path: path.is_file() and sha256(path) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nat_attto", "in.pth", "out.safetensors"], "did you mean nat_atto"),
        (["vit_tiny_patch16_224", "in.pth", "out.safetensors"], "expected a model of vitarium"),
        (["nat_atto", "no.pth", "out.safetensors"], "error: no.pth: no such file"),
        (["nat_atto", "no.pth", ""], "out: expected a name that ends with .safetensors"),
        (["swin", "in.pth", "out.pth", "--to", "transformers"], "unknown model"),
        (
            ["dinat_s_atto", "in.pth", "out.pth", "--to", "transformers"],
            "transformers has NAT and DiNAT only, got dinat_s_atto",
        ),
        (
            ["fused_davit_base_fl", "in.pth", "out.pth", "--to", "authors"],
            "the authors' layout of fused_davit_base_fl can be read, not written",
        ),
        (["vitrpb_atto", "in.pth", "out.safetensors", "--task", "det"], "no form of its own"),
        (["nat_atto", "in.pth", "out.safetensors", "--num-classes", "-1"], "no negative number"),
    ],
)
def test_errors_are_one_line(argv, message, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = program("convert", *argv)
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_sizes_that_do_not_parse(capsys):
    for size in ("0", "64x", "x64", "64x64x64", "-1"):
        with pytest.raises(SystemExit):
            vitarium_cli.main(["convert", "a", "b", "c", "--img-size", size])
        assert "expected N or HxW in pixels" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_disk_that_fills_up_leaves_what_was_there(suffix, program, tmp_path):
    import resource

    source, out = ready(tmp_path), tmp_path / f"out{suffix}"
    out.write_bytes(b"before")
    card = {"format": cards.CARD_FORMAT, "output": {"file": out.name}}
    out.with_suffix(".json").write_text(json.dumps(card))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        status, _, err = program("convert", "nat_atto", source, out, "--to", "authors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert err.count("\n") == 1
    assert f"{out}: cannot be written" in err
    assert "File too large" in err
    assert out.read_bytes() == b"before"
    assert json.loads(out.with_suffix(".json").read_text()) == card
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.skipif(sys.platform == "win32", reason="no modes of files")
def test_whoever_may_read_the_card_may_read_the_tensors(program, tmp_path):
    for suffix in (".safetensors", ".pth"):
        out = tmp_path / f"out{suffix[1]}{suffix}"
        assert program("convert", "nat_atto", ready(tmp_path), out, "--to", "authors").status == 0
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_too_little_space_is_seen_before_writing(program, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(cards.shutil, "disk_usage", lambda path: usage)
    result = program("convert", "nat_atto", ready(tmp_path), tmp_path / "out.safetensors")
    assert result.status == 1
    assert "1,000 are left" in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"in.pth"}


def test_a_plan_needs_no_file():
    found = weights(timm.create_model("nat_atto"))
    planned = conversion.plan("nat_atto", found)
    assert planned.fault is None
    assert same(dict(planned.tensors), found)
    lost = found | {"norm.weight": found["norm.weight"].to("meta")}
    with pytest.raises(CheckpointError, match="norm.weight is without data"):
        conversion.plan("nat_atto", lost)
    with pytest.raises(CheckpointError, match="empty"):
        conversion.plan("nat_atto", {})
    with pytest.raises(ValueError, match="to: expected one of"):
        conversion.plan("nat_atto", found, to="keras")
