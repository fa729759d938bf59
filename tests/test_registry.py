"""timm's registry and ours: names, tags, weights, and building with weights."""

import ast
import json
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from servers import Reply, Server
from timm.models import get_arch_pretrained_cfgs, model_entrypoint, save_for_hf

import vitarium.backbones
from vitarium.backbones import _registry, nat
from vitarium.backbones._registry import entries
from vitarium.checkpoints import CheckpointError, Weight

pytestmark = pytest.mark.usefixtures("cache")

BACKBONES = Path(vitarium.backbones.__file__).parent
FAMILIES = sorted(path.stem for path in BACKBONES.glob("[a-z]*.py"))
ATTO = "nat_atto"
DIGITS = "nat_atto.vitarium_digits"


# Names


def test_backbones_are_imported_in_order_and_nothing_else():
    _, *imports = ast.parse((BACKBONES / "__init__.py").read_text()).body
    assert [ast.unparse(line) for line in imports] == [
        f"from vitarium.backbones.{family} import *" for family in FAMILIES
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_small_and_tagged_entries_of_its_name(family):
    names = [
        name for name, module in _registry.entries().items()
        if module.__name__ == f"vitarium.backbones.{family}"
    ]  # fmt: skip
    attos = [name for name in names if name.endswith("_atto")]
    assert attos
    for name in attos:
        atto = timm.create_model(name, device="meta")
        assert sum(p.numel() for p in atto.parameters()) <= 1_500_000
    for name in names:
        assert re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)+", name)
        assert model_entrypoint(name).__module__ == f"vitarium.backbones.{family}"
        cfgs = get_arch_pretrained_cfgs(name)
        assert cfgs
        for full, cfg in cfgs.items():
            assert full == f"{name}.{cfg.tag}"
            assert bool(cfg.license) == (full in _registry.entries()[name]._WEIGHTS)
            assert cfg.paper_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_published_figures_belong_to_tags(family):
    module = sys.modules[f"vitarium.backbones.{family}"]
    tags = {
        f"{entry}.{tag}": cfg
        for entry, default in module.default_cfgs.items()
        for tag, cfg in default.cfgs.items()
    }
    classifiers = {name: w for name, w in module._WEIGHTS.items() if w.task == "cls"}
    assert classifiers.keys() == {name for name, cfg in tags.items() if cfg.license}
    assert module._PUBLISHED.keys() <= module._WEIGHTS.keys()
    for name, weight in classifiers.items():
        assert tags[name].url == weight.url
        assert tags[name].file == _registry.packaged(weight)
        assert tags[name].license == weight.licence
        assert timm.is_model_pretrained(name) == bool(weight.url or _registry.packaged(weight))


def entry_of_ours(name):
    """A model function as a family file would have it."""
    module = types.ModuleType("vitarium.backbones.invented")
    module.default_cfgs = {}
    exec(f"def {name}(pretrained=False, **kwargs): return None", vars(module))
    sys.modules[module.__name__] = module
    return getattr(module, name)


def test_timm_keeps_a_name_that_it_has():
    theirs = model_entrypoint("resnet18")
    before = _registry.entries()
    with pytest.warns(UserWarning, match=r"vitarium\.backbones\.invented\.resnet18 is not regist"):
        ours = _registry.register(entry_of_ours("resnet18"))
    assert ours() is None
    assert model_entrypoint("resnet18") is theirs
    assert timm.is_model_pretrained("resnet18.a1_in1k")
    assert _registry.entries() == before


def test_a_free_name_is_registered_without_a_word(monkeypatch):
    monkeypatch.setattr(_registry, "_entries", dict(_registry._entries))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = _registry.register(entry_of_ours("invented_atto"))
    assert model_entrypoint("invented_atto") is ours
    assert "invented_atto" in _registry.entries()


# Weights


@pytest.fixture
def trained():
    """A state dict of nat_atto that no initialisation gives."""
    torch.manual_seed(7)
    model = timm.create_model(ATTO)
    return {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items()}


def load(name=ATTO, overlay=None, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def assert_holds(model, expected, but=()):
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]) == (key not in but), key


@pytest.fixture
def file(trained, tmp_path):
    save_file(trained, tmp_path / "own.safetensors")
    return {"file": str(tmp_path / "own.safetensors")}


def test_own_file_and_own_tensors(trained, file):
    assert_holds(load(overlay=file), trained)
    assert_holds(load(overlay={"state_dict": trained}), trained)
    assert_holds(load(overlay={"state_dict": {"model": trained}}), trained)
    model = load(DIGITS, overlay=file)
    assert model.pretrained_cfg["file"] == file["file"]
    assert "state_dict" not in model.pretrained_cfg


def test_own_file_as_timms_scripts_give_it(trained, file):
    cfg = {**vars(timm.get_pretrained_cfg(ATTO)), **file}
    assert_holds(timm.create_model(ATTO, pretrained=True, pretrained_cfg=cfg), trained)


def test_checkpoint_path(trained, file):
    assert_holds(timm.create_model(ATTO, checkpoint_path=file["file"]), trained)


@pytest.mark.filterwarnings("ignore:.*no licence is stated")
@pytest.mark.parametrize("known", [True, False], ids=["tag", "overlay"])
def test_download(trained, tmp_path, monkeypatch, known):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save(trained, tmp_path / "x.pth")
    with Server({"/x.pth": Reply((tmp_path / "x.pth").read_bytes())}) as server:
        url = server.url("/x.pth")
        if known:
            monkeypatch.setitem(nat._WEIGHTS, DIGITS, Weight(url=url, licence="MIT"))
        overlay = {"file": None, "url": None if known else url}
        assert_holds(load(overlay=overlay), trained)
        assert_holds(load(overlay=overlay), trained)
        assert server.requests == ["/x.pth"]
    cached = (tmp_path / "home" / "hub" / "checkpoints" / "vitarium").glob("*.pth")
    assert [path.name.startswith(DIGITS) for path in cached] == [True]


def test_a_known_weight_is_verified(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save(trained, tmp_path / "x.pth")
    with Server({"/x.pth": Reply((tmp_path / "x.pth").read_bytes())}) as server:
        weight = Weight(url=server.url("/x.pth"), sha256="0" * 64)
        monkeypatch.setitem(nat._WEIGHTS, DIGITS, weight)
        with pytest.raises(CheckpointError, match="expected sha256 0000"):
            load(overlay={"file": None})


def test_a_file_that_should_ship_and_does_not(monkeypatch):
    monkeypatch.setitem(nat._WEIGHTS, DIGITS, Weight(file="nat_atto.absent.safetensors"))
    with pytest.raises(CheckpointError, match=r"nat_atto\.absent\.safetensors: cannot be read"):
        load(overlay={"file": None})


@pytest.mark.filterwarnings("ignore:.*no licence is stated")
def test_cache_dir(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(trained, tmp_path / "x.pth")
    with Server({"/x.pth": Reply((tmp_path / "x.pth").read_bytes())}) as server:
        overlay = {"file": None, "url": server.url("/x.pth")}
        assert_holds(load(overlay=overlay, cache_dir="~/cache"), trained)
    assert_holds(load(overlay=overlay, cache_dir=tmp_path / "cache"), trained)
    assert len(list((tmp_path / "cache").glob(f"{DIGITS}-*.pth"))) == 1
    assert not (tmp_path / "home").exists()
    with pytest.raises(ValueError, match="cache_dir: expected a path, got 3"):
        load(overlay=overlay, cache_dir=3)


def test_missing_weights_are_called_missing():
    with pytest.raises(
        CheckpointError,
        match=r"nat_atto\.own: no weights are known; give a file of your own as .*\. Other weights "
        r"of nat_atto that a program can fetch: nat_atto\.vitarium_digits \(vitarium list 'nat_a",
    ):
        load(overlay={"tag": "own", "file": None})
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        load(f"{ATTO}.nonsense")


def test_an_address_of_the_callers_counts_more_than_a_tags_hub():
    name = "fused_swin_tiny_patch4_window7_224"
    assert timm.get_pretrained_cfg(name).hf_hub_id
    with Server({}) as server:
        overlay = {"url": server.url("/own.pth")}
        with pytest.raises(CheckpointError, match=r"own\.pth: HTTP 404"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(
    "name", ["nat_mini.shi_in1k", "fused_swin_tiny_patch4_window7_224.ms_in1k"]
)
def test_the_registry_of_weights_says_where_a_tags_are(name, monkeypatch):
    weights = entries()[name.partition(".")[0]]._WEIGHTS
    with Server({}) as server:
        elsewhere = Weight(url=server.url("/a.pth"), mirrors=(server.url("/b.pth"),))
        monkeypatch.setitem(weights, name, elsewhere)
        with pytest.raises(CheckpointError, match="HTTP 404"):
            timm.create_model(name, pretrained=True)
        assert server.requests == ["/a.pth", "/b.pth"]


@pytest.mark.parametrize("kind", ["manual", "unreleased", "url"])
def test_what_else_there_is_where_weights_cannot_be_had(kind, monkeypatch):
    told = {
        "manual": "ask at https://example.org",
        "unreleased": "never",
        "url": "http://[::1]:9/x",
    }
    monkeypatch.setitem(nat._WEIGHTS, "nat_atto.own", Weight(**{kind: told[kind]}))
    overlay = {"tag": "own", "file": None, "url": told[kind] if kind == "url" else None}
    with pytest.raises(CheckpointError) as caught:
        load(overlay=overlay)
    assert told[kind] in str(caught.value)
    assert ("pretrained_cfg_overlay=dict(file=...)" in str(caught.value)) == (kind != "url")
    assert str(caught.value).endswith(
        "Other weights of nat_atto that a program can fetch: nat_atto.vitarium_digits "
        "(vitarium list 'nat_atto*')"
    )
    monkeypatch.setitem(nat._WEIGHTS, DIGITS, Weight(unreleased="never"))
    monkeypatch.setitem(nat._WEIGHTS, "nat_atto.det", Weight(url="http://x/y", task="det"))
    with pytest.raises(CheckpointError, match="There are no other weights of nat_atto that"):
        load(overlay=overlay)


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth: no such file"):
        load(overlay={"file": tmp_path / "absent.pth"})
    with pytest.raises(CheckpointError, match="expected a checkpoint file, got a folder"):
        load(overlay={"file": str(tmp_path)})
    with pytest.raises(ValueError, match="file: expected a path, got 3"):
        load(overlay={"file": 3})
    (tmp_path / "x.pth").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match=r"x\.pth: .* got a web page"):
        load(overlay={"file": tmp_path / "x.pth"})
    torch.save({"epoch": 3}, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match=r"nat_atto: .*y\.pth: expected tensors by name"):
        load(overlay={"file": tmp_path / "y.pth"})
    with pytest.raises(CheckpointError, match="the checkpoint: .* got an empty dictionary"):
        load(overlay={"state_dict": {}})


def test_a_file_is_compared_before_its_tensors_are_read(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(_registry, "read", lambda *args, **kwargs: pytest.fail("it is read"))
    del trained["norm.weight"]
    save_file(trained, tmp_path / "x.safetensors")
    torch.save({"model": trained}, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        with pytest.raises(
            CheckpointError, match=rf"{name} does not fit: .* missing: norm\.weight"
        ):
            load(overlay={"file": tmp_path / name})


def test_what_cannot_be_converted_is_called_that(trained):
    def broken(state_dict, model):
        raise RuntimeError("shape mismatch")

    overlay = {"state_dict": trained}
    with pytest.raises(CheckpointError, match="nat_atto: the checkpoint: cannot be conv.*mismatch"):
        _registry.build(
            nat.NAT,
            ATTO,
            True,
            weights={},
            filter_fn=broken,
            pretrained_cfg_overlay=overlay,
            **{"embed_dim": 8, "depths": (1,), "num_heads": (1,), "kernel_size": 3},
        )


def test_paths_of_any_kind(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(trained, tmp_path / "own.safetensors")
    for path in ("~/own.safetensors", tmp_path / "own.safetensors"):
        assert_holds(load(overlay={"file": path}), trained)


def test_another_number_of_classes(trained, file):
    head = {"head.weight", "head.bias"}
    for overlay in (file, {"state_dict": trained}):
        model = load(overlay=overlay, num_classes=5)
        assert model.head.out_features == 5
        assert_holds(model, {**trained, **{key: torch.zeros(0) for key in head}}, but=head)
        assert_holds(load(overlay=overlay, num_classes=0), trained)
    lost = {key: trained[key] for key in trained if key not in head}
    with pytest.raises(CheckpointError, match=r"2 missing: head\.weight, head\.bias"):
        load(overlay={"state_dict": lost})


def test_classes_before_the_first(trained):
    """A background class and the like, which timm drops by the cfg's label_offset."""
    more = {
        **trained,
        "head.weight": torch.cat([torch.ones(1, 256), trained["head.weight"]]),
        "head.bias": torch.cat([torch.ones(1), trained["head.bias"]]),
    }
    assert_holds(load(overlay={"state_dict": more, "label_offset": 1}), trained)
    assert load(overlay={"state_dict": more, "label_offset": 1}, num_classes=3).num_classes == 3
    with pytest.raises(CheckpointError, match=r"head\.weight expected \[10, .* got \[11, 256\]"):
        load(overlay={"state_dict": more})
    with pytest.raises(CheckpointError, match=r"head\.weight expected \[10, .* got \[9, 256\]"):
        load(overlay={"state_dict": trained, "label_offset": 1})


def test_a_classifier_that_fits_is_kept(trained):
    """timm alone compares with the registry's number of classes and drops it."""
    torch.manual_seed(8)
    own = {**trained, "head.weight": torch.randn(3, 256), "head.bias": torch.randn(3)}
    assert_holds(load(overlay={"state_dict": own}, num_classes=3), own)
    with pytest.raises(
        CheckpointError, match=r"head\.weight expected \[10, 256\].* got \[3, 256\]"
    ):
        load(overlay={"state_dict": own})


def test_another_number_of_channels(trained, file):
    stem = "patch_embed.proj.0.weight"
    model = load(overlay=file, in_chans=1)
    gray = trained[stem].sum(1, keepdim=True)
    torch.testing.assert_close(model.state_dict()[stem], gray)
    assert_holds(model, {**trained, stem: model.state_dict()[stem]})
    for shape, channels in (((16, 3, 5, 5), 1), ((16, 4, 3, 3), 1), ((16, 1, 3, 3), 3)):
        with pytest.raises(CheckpointError, match=stem):
            load(overlay={"state_dict": {**trained, stem: torch.zeros(shape)}}, in_chans=channels)
    own = {**trained, stem: torch.randn(16, 1, 3, 3)}
    assert_holds(load(overlay={"state_dict": own}, in_chans=1), own)


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"num_classes": 5}, {"in_chans": 1}, {"features_only": True}]
)
def test_nothing_else_may_differ(trained, change, kwargs):
    key = "levels.0.blocks.0.attn.rpb"
    if change == "missing":
        del trained[key]
    elif change == "unexpected":
        key = "levels.0.blocks.7.attn.rpb"
        trained[key] = torch.zeros(1)
    else:
        trained[key] = torch.zeros(1, 3, 3)
    with pytest.raises(CheckpointError, match=rf"nat_atto: .* 1 {change}: {key}"):
        load(overlay={"state_dict": trained}, **kwargs)


def test_features_only(trained, file):
    features = load(overlay=file, features_only=True, out_indices=(0, 2))
    assert_holds(features.model, trained)
    assert features.feature_info.channels() == [32, 128]
    assert load(overlay=file, features_only=True).feature_info.reduction() == [4, 8, 16, 32]


def test_folder_saved_for_the_hub(trained, file, tmp_path):
    save_for_hf(load(overlay=file), tmp_path / "saved", safe_serialization=True)
    assert_holds(timm.create_model(f"local-dir:{tmp_path}/saved", pretrained=True), trained)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architecture"] == ATTO
    assert "file" not in config["pretrained_cfg"]


def test_weights_beside_those_of_a_folder(file, tmp_path):
    save_for_hf(load(overlay=file), tmp_path / "saved", safe_serialization=True)
    name = f"local-dir:{tmp_path}/saved"
    for key, value in (*file.items(), ("url", "http://x/y.pth")):
        with pytest.raises(ValueError, match=f"overlay: expected no {key} beside the weights of l"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay={key: value})
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"crop_pct": 0.5})
    assert model.pretrained_cfg["crop_pct"] == 0.5


def test_a_hub_s_config_names_no_other_weights(trained, tmp_path, monkeypatch):
    save_file(trained, tmp_path / "x.safetensors")
    monkeypatch.setattr(_registry, "hub_file", lambda *args: tmp_path / "x.safetensors")
    cfg = {
        **timm.get_pretrained_cfg(ATTO).to_dict(),
        **{"source": "hf-hub", "hf_hub_id": "someone/nat", "file": "other", "state_dict": {}},
    }
    assert_holds(timm.create_model(ATTO, pretrained=True, pretrained_cfg=cfg), trained)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "best.pth"])
def test_folder_with_a_pickle(trained, file, tmp_path, name):
    folder = tmp_path / "saved"
    save_for_hf(load(overlay=file), folder)
    (folder / "pytorch_model.bin").rename(folder / name)
    assert_holds(timm.create_model(f"local-dir:{folder}", pretrained=True), trained)
    torch.save(print, folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}: "):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_folders_with_no_checkpoint_or_too_many(file, tmp_path):
    folder = tmp_path / "saved"
    save_for_hf(load(overlay=file), folder)
    (folder / "pytorch_model.bin").rename(folder / "b.pth")
    (folder / "a.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"saved: expected .*, or one .*, got a\.pth, b\.pth"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    for path in folder.glob("*.pth"):
        path.unlink()
    with pytest.raises(CheckpointError, match="saved: expected .*, got none"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_a_folder_s_config_may_leave_names_out(trained, file, tmp_path):
    folder = tmp_path / "saved"
    save_for_hf(load(overlay=file), folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    for key in ("first_conv", "classifier"):
        config["pretrained_cfg"].pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    assert_holds(timm.create_model(f"local-dir:{folder}", pretrained=True), trained)


def test_hub(trained, monkeypatch, tmp_path):
    asked = []
    save_file(trained, tmp_path / "x.safetensors")

    def answer(*args):
        asked.append(args)
        return tmp_path / "x.safetensors"

    monkeypatch.setattr(_registry, "hub_file", answer)
    assert_holds(load(overlay={"hf_hub_id": "someone/nat"}), trained)
    overlay = {"hf_hub_id": "someone/nat@v1", "hf_hub_filename": "x.safetensors"}
    assert_holds(load(overlay=overlay, cache_dir="~/x"), trained)
    assert asked == [
        ("someone/nat", None, None, None),
        ("someone/nat", "x.safetensors", "v1", Path("~/x").expanduser()),
    ]
    del trained["norm.weight"]
    save_file(trained, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: norm\.weight"):
        load(overlay={"hf_hub_id": "someone/nat"})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"pretrained_strict": False}, "pretrained_strict: expected True"),
        ({"pretrained_filter_fn": dict}, "pretrained_filter_fn: expected None"),
    ],
)
def test_options_of_timm_that_would_load_less_are_refused(trained, option, message):
    with pytest.raises(ValueError, match=message):
        load(overlay={"state_dict": trained}, **option)
    assert_holds(load(overlay={"state_dict": trained}, pretrained_strict=True), trained)
