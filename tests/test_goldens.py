"""Every model computes what its authors' code computed."""

import json
from pathlib import Path

import golden
import pytest
import timm
import torch

from vitarium import checkpoints
from vitarium.backbones import dinat_isotropic
from vitarium.backbones._registry import entries
from vitarium.heads.features import FeatureBackbone

ROOT = Path(__file__).parent / "golden"
OTHERS = {"ops", "segmentation", "detection"}
FAMILIES = sorted(path for path in ROOT.iterdir() if path.is_dir() and path.name not in OTHERS)
TOLERANCE = 1e-7  # of the expected values' spread

ROWS = {
    case: (folder / case, row)
    for folder in FAMILIES
    for case, row in json.loads((folder / "index.json").read_text()).items()
    if "left_out" not in row  # a network that the zoo does not have, and why
}
FULL = [case for case, (path, _) in ROWS.items() if path.with_suffix(".safetensors").exists()]


def build(row, **kwargs):
    create = {"timm": timm.create_model, "features": FeatureBackbone}[row["api"]]
    return create(row["entry"], **row["kwargs"], **kwargs)


def assert_close(out, expected, shape, what):
    assert list(out.shape) == shape, what
    error = (golden.sample(out) - expected).abs().max() / expected.std()
    assert error <= TOLERANCE, f"{what}: {error:.1e} of the spread"


@pytest.mark.parametrize("folder", FAMILIES, ids=lambda path: path.name)
def test_every_golden_has_a_row_and_every_row_a_golden(folder):
    rows = json.loads((folder / "index.json").read_text())
    assert {path.stem for path in folder.glob("*.json")} - {"index"} == set(rows)
    assert {path.stem for path in folder.glob("*.safetensors")} <= set(rows)


def test_every_family_has_goldens():
    known = set()
    for module in entries().values():
        known |= {*getattr(module, "_GOLDENS", [module.__name__.rpartition(".")[2]])}
    assert known == {folder.name for folder in FAMILIES}


def family(row):
    return entries()[row["entry"].partition(".")[0]]


def inner(model):
    """The part of a model that the authors have too."""
    return model.model if isinstance(model, FeatureBackbone) else model


@pytest.mark.parametrize("case", ROWS)
def test_manifest(case):
    """The authors' names lead to ours and back, and what they store beside can be rebuilt."""
    path, row = ROWS[case]
    description = json.loads(path.with_suffix(".json").read_text())
    model = build(row, device="meta")
    assert sum(p.numel() for p in model.parameters()) == description["num_params"]
    # One value for each tensor, which no copy of it holds: so the largest models cost nothing.
    authors = {
        name: torch.tensor(float(i)).expand(shape)
        for i, (name, shape) in enumerate(description["tensors"].items())
    }
    buffers = family(row)._BUFFERS(inner(model))
    converted = checkpoints.convert(authors | buffers, model)
    meta = {name: tensor.to("meta") for name, tensor in converted.items()}
    report = checkpoints.compare(meta, model)
    assert report.whole, report

    prefix = "model." if row["api"] == "features" else ""
    ours = {name.removeprefix(prefix): tensor for name, tensor in converted.items()}
    back = family(row)._RENAMES.to_authors(ours) | buffers
    shapes = {name: list(tensor.shape) for name, tensor in back.items()}
    assert shapes == description["tensors"] | description["constants"]
    for name, tensor in authors.items():
        assert back[name].stride() == tensor.stride(), name
        assert back[name].flatten()[:1].equal(tensor.flatten()[:1]), name


@pytest.mark.parametrize("case", FULL)
def test_case(case, ops_run):
    path, row = ROWS[case]
    description, expected = golden.load(path)
    shapes = description["output_shapes"]
    model = build(row, dtype=torch.float64).eval()
    authors = golden.state_dict(description)
    report = checkpoints.load(model, authors)
    assert set(report.matched) == set(model.state_dict())
    assert not report.ignored
    back = family(row)._RENAMES.to_authors(inner(model).state_dict())
    assert authors.keys() <= back.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in authors.items())

    image = golden.normal(description["seed"], description["input_shape"]).requires_grad_()
    outputs = outputs_of(model, row["api"], image, shapes)
    for name, shape in shapes.items():
        assert_close(outputs[name], expected[name], shape, name)

    main = outputs.get("logits", list(outputs.values())[-1])
    (main * golden.normal(description["seed"] + 1, main.shape)).sum().backward()
    assert_close(image.grad, expected["grad_input"], list(image.shape), "grad_input")
    assert bool(ops_run) != case.startswith("vitrpb")  # whose attention is torch's


def outputs_of(model, api, image, names):
    """What is recorded of one family or another, the map with the gradient last."""
    if api == "features":
        return {f"stage{i}": y for i, y in zip(model.out_indices, model(image), strict=True)}
    with torch.no_grad():
        final, stages = model.forward_intermediates(image)
    outputs = {
        "logits": lambda: model(image),
        "pooled": lambda: model.forward_head(final, pre_logits=True),
        "embed": lambda: model.patch_embed(image).permute(0, 3, 1, 2),
        "tokens": lambda: final if final.ndim == 3 else stages[-1],
        **{f"stage{i}": lambda y=y: y for i, y in enumerate(stages)},
    }
    return {name: outputs[name]() for name in names}


@pytest.mark.parametrize("case", [case for case in ROWS if case.startswith("vitrpb")])
def test_authors_buffers(case):
    """ViT-rpb's published files hold an index of every block: it is dropped, and can be rebuilt."""
    path, row = ROWS[case]
    constants = json.loads(path.with_suffix(".json").read_text())["constants"]
    model = timm.create_model(row["entry"])
    buffers = entries()[row["entry"]]._BUFFERS(model)
    assert {name: list(tensor.shape) for name, tensor in buffers.items()} == constants
    index = buffers["layers.0.attn.relative_position_index"]
    table = model.layers[0].attn.rpb
    bias = table.flatten(1)[:, index]
    assert torch.equal(bias, dinat_isotropic.position_bias(table, 14, 14)[0])
    published = {**model.state_dict(), **buffers}
    report = checkpoints.load(model, published)
    assert set(report.matched) == set(model.state_dict())
    model.load_state_dict(published)  # as timm's checkpoint_path does
    assert published.keys() > model.state_dict().keys()
