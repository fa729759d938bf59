"""What the families know of checkpoints: constants, other layouts, other sizes, detectors."""

import inspect
from fnmatch import fnmatchcase

import pytest
import timm
import torch
import torch.nn.functional as F
from attos import ATTOS, create, image, limits

from vitarium import checkpoints
from vitarium.backbones import dinat, nat
from vitarium.backbones._nat_transformers import from_transformers, to_transformers
from vitarium.backbones._registry import entries
from vitarium.checkpoints import CheckpointError
from vitarium.heads.features import FeatureBackbone

DENSE = [
    name
    for name in ATTOS
    if hasattr(entries()[name], "dense_adapter") and "dense form" not in limits(name)
]


def randomized(model, seed=0):
    """Every tensor of its own, so that swapped ones are found out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(x, other[k]) for k, x in state.items())


# Constants that the authors store


SWINS = {
    "swin": ("swin_tiny_patch4_window7_224", {"window_size": 4, "img_size": 64}),
    "swin, not square": ("swin_tiny_patch4_window7_224", {"window_size": 4, "img_size": (96, 160)}),
    "swinv2": ("swinv2_tiny_window8_256", {"window_size": 4, "img_size": 64}),
    "swinv2, not square": ("swinv2_tiny_window8_256", {"window_size": 5, "img_size": (80, 160)}),
    "swinv2, fine-tuned": ("swinv2_base_window12to16_192to256", {"img_size": 128}),
}


@pytest.mark.parametrize("case", SWINS)
def test_constants_of_swin_are_what_timm_computes(case):
    """timm computes in its blocks what the authors store, and clamps windows as ours do."""
    name, kwargs = SWINS[case]
    kwargs = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), **kwargs}
    theirs = timm.create_model(name, **kwargs)
    expected = {key: x for key, x in theirs.named_buffers() if not key.endswith("k_bias")}
    for device in ("cpu", "meta"):
        model = timm.create_model(f"fused_{name}", device=device, **kwargs)
        found = entries()[f"fused_{name}"]._BUFFERS(model)
        assert same(found, expected)
        assert all(x.dtype == expected[key].dtype for key, x in found.items())
    leaves = {key.rpartition(".")[2] for key in found}
    table = {"relative_coords_table"} if "v2" in name else set()
    assert leaves == {"relative_position_index", "attn_mask"} | table


def attended(attn, x, index, mask):
    """Attention in the windows of a map with stored constants, as the authors' classifiers do it.

    [B, H, W, C] -> [B, H, W, C]: roll, cut, look biases up, mask, attend, put together, roll back.
    """
    side = round(len(index) ** 0.5)
    shift = 0 if mask is None else side // 2
    height, width = (length // side for length in x.shape[1:3])
    cut = x.roll((-shift, -shift), (1, 2)).unfold(1, side, side).unfold(2, side, side)
    cut = cut.flatten(4).flatten(0, 2).mT  # [windows, L, C]
    query, key, value = attn.qkv(cut).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    table = attn.relative_position_bias_table
    whole = round(len(table) ** 0.5)
    middle = slice((whole + 1) // 2 - side, (whole - 1) // 2 + side)  # of a clamped window
    table = table.unflatten(0, (whole, whole))[middle, middle].flatten(0, 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5 + table[index].permute(2, 0, 1)
    if mask is not None:
        scores = scores + mask[:, None]
    y = attn.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    y = y.unflatten(1, (side, side)).unflatten(0, (1, height, width)).transpose(2, 3)
    return y.flatten(3, 4).flatten(1, 2).roll((shift, shift), (1, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["agent_swin_atto", "fused_swin_atto"])
def test_attention_with_stored_constants_is_the_models(name):
    fused = name.startswith("fused")
    kwargs = {"semantics": "authors"} if fused else {"agent_depths": (0, 0, 1, 0)}
    window = {"depths": (2, 2, 2, 2), "img_size": (96, 192), "window_size": 6}
    model = randomized(timm.create_model(name, **kwargs, **window)).double()
    constants = entries()[name]._BUFFERS(model)
    masked = []
    for key in [key for key in constants if key.endswith("index")]:
        block = model.get_submodule(key.rpartition(".attn")[0])
        stage = int(key.split(".")[1])
        size = block.input_resolution if fused else model._map_size(stage)
        mask = constants.get(key.replace("attn.relative_position_index", "attn_mask"))
        masked.append(mask is not None)
        x = torch.randn(1, *size, block.attn.qkv.in_features, dtype=torch.float64)
        settings = (block.shift_size, block.semantics) if fused else ()
        y = attended(block.attn, x, constants[key], mask)
        torch.testing.assert_close(y, block.attn(x, *settings), rtol=1e-9, atol=1e-9)
    plain = [False, True, False, True] + [False] * 4  # stages 2 and 3 are 6 x 12 and 3 x 6 tokens
    assert masked == (plain if fused else plain[:4] + plain[5:])


# transformers' layout


NATS = {
    "nat": ("nat_atto", {}),
    "nat with factors": ("nat_atto", {"layer_scale": 0.1}),
    "dinat": ("dinat_atto", {"layer_scale": 0.1}),
}


def transformers_shapes(model, prefix):
    """Names and shapes of a classifier, or of a backbone (without a prefix), by level and block.

    As ``state_dict()`` of transformers 4.40.2 lists them for configurations of these sizes.
    """
    dim, shapes = 32, {}
    shapes["embeddings.patch_embeddings.projection.0"] = ([16, 3, 3, 3], [16])
    shapes["embeddings.patch_embeddings.projection.1"] = ([32, 16, 3, 3], [32])
    shapes["embeddings.norm"] = ([32], [32])
    tensors = {}
    for i, depth in enumerate((2, 2, 3, 1)):
        for j in range(depth):
            layer = f"encoder.levels.{i}.layers.{j}"
            for norm in ("layernorm_before", "layernorm_after"):
                shapes[f"{layer}.{norm}"] = ([dim], [dim])
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                shapes[f"{layer}.attention.{part}"] = ([dim, dim], [dim])
            shapes[f"{layer}.intermediate.dense"] = ([2 * dim, dim], [2 * dim])
            shapes[f"{layer}.output.dense"] = ([dim, 2 * dim], [dim])
            attn = model.levels[i].blocks[j].attn
            side = 2 * attn.kernel_size - 1
            tensors[f"{layer}.attention.self.rpb"] = [2**i, side, side]
            if model.levels[i].blocks[j].gamma1 is not None:
                tensors[f"{layer}.layer_scale_parameters"] = [2, dim]
        if not prefix:
            shapes[f"hidden_states_norms.stage{i + 1}"] = ([dim], [dim])
        if i < 3:
            tensors[f"encoder.levels.{i}.downsample.reduction.weight"] = [2 * dim, dim, 3, 3]
            shapes[f"encoder.levels.{i}.downsample.norm"] = ([2 * dim], [2 * dim])
            dim *= 2
    if prefix:
        shapes["layernorm"] = ([dim], [dim])
    for name, (weight, bias) in shapes.items():
        tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
    tensors = {prefix + name: shape for name, shape in tensors.items()}
    if prefix:
        tensors |= {"classifier.weight": [10, dim], "classifier.bias": [10]}
    return tensors


@pytest.mark.parametrize("case", NATS)
@pytest.mark.parametrize("task", [None, "det"])
def test_transformers_names_and_shapes_both_ways(case, task):
    name, kwargs = NATS[case]
    family = entries()[name]
    model = randomized(timm.create_model(name, **kwargs))
    if task is not None:
        model = randomized(FeatureBackbone(name, task=task, **kwargs).model)
    prefix = "" if task else name.replace("atto", "").replace("_", ".")
    state = model.state_dict()
    theirs = family.to_transformers(state, model)
    assert {k: list(x.shape) for k, x in theirs.items()} == transformers_shapes(model, prefix)
    assert same(from_transformers(theirs), state)
    assert same(family.to_transformers(from_transformers(theirs), model), theirs)
    assert same(checkpoints.convert(theirs, model), state)
    assert same(from_transformers({k.removeprefix(prefix): theirs[k] for k in theirs}), state)


def test_transformers_projections_and_factors_are_the_ones_they_are_called():
    model = randomized(timm.create_model("nat_atto", layer_scale=0.1))
    theirs = nat.to_transformers(model.state_dict(), model)
    block, layer = model.levels[1].blocks[1], "nat.encoder.levels.1.layers.1"
    x = torch.randn(3, 64)
    maps = block.attn.qkv(x).chunk(3, 1)
    for part, y in zip(("query", "key", "value"), maps, strict=True):
        weight, bias = (
            theirs[f"{layer}.attention.self.{part}.{leaf}"] for leaf in ("weight", "bias")
        )
        torch.testing.assert_close(F.linear(x, weight, bias), y)
    of_attention, of_mlp = theirs[f"{layer}.layer_scale_parameters"]
    assert torch.equal(of_attention, block.gamma1)
    assert torch.equal(of_mlp, block.gamma2)


@torch.no_grad()
@pytest.mark.parametrize("case", NATS)
def test_transformers_files_load(case, tmp_path):
    """As classifiers, into classifiers of other classes, into backbones, and a backbone's."""
    name, kwargs = NATS[case]
    model = randomized(timm.create_model(name, **kwargs))
    file = tmp_path / "pytorch_model.bin"
    torch.save(entries()[name].to_transformers(model.state_dict(), model), file)
    overlay = {"pretrained_cfg_overlay": {"file": str(file)}, "pretrained": True}
    assert same(timm.create_model(name, **kwargs, **overlay).state_dict(), model.state_dict())
    other = timm.create_model(name, num_classes=3, **kwargs, **overlay)
    assert torch.equal(other.norm.weight, model.norm.weight)

    dense = FeatureBackbone(name, task="seg", checkpoint=file, **kwargs)
    for i in range(4):  # which a classifier does not have
        assert torch.equal(dense.model.get_submodule(f"norm{i}").weight, torch.ones(32 * 2**i))
    assert torch.equal(dense.model.levels[3].blocks[0].attn.rpb, model.levels[3].blocks[0].attn.rpb)
    randomized(dense, 1)
    backbone = entries()[name].to_transformers(dense.model.state_dict(), dense.model)
    other = FeatureBackbone(name, task="seg", checkpoint=backbone, **kwargs)
    assert same(other.state_dict(), dense.state_dict())
    report = checkpoints.load(FeatureBackbone(name, **kwargs), file)
    assert {"norm.weight", "head.bias"} <= report.ignored.keys()


@pytest.mark.parametrize("entry", ["nat_base", "nat_tiny", "dinat_base", "dinat_large_11x11"])
def test_transformers_released_sizes_without_data(entry):
    model = timm.create_model(entry, device="meta")
    state = model.state_dict()
    theirs = entries()[entry].to_transformers(state, model)
    found = checkpoints.convert(theirs, model)
    assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in state.items()}
    assert all(x.is_meta for x in found.values())
    # three projections of a weight and a bias are one of each, and two factors are one
    factors = sum("gamma1" in key for key in state)
    assert (
        len(theirs) == len(state) + 4 * sum(len(level.blocks) for level in model.levels) - factors
    )


def broken(theirs, how):
    layer = "nat.encoder.levels.1.layers.0"
    state = dict(theirs)
    if how == "missing":
        del state[f"{layer}.attention.self.key.weight"]
    elif how == "misshapen":
        state[f"{layer}.attention.self.key.bias"] = torch.ones(3)
    elif how == "scalar":
        for part in ("query", "key", "value"):
            state[f"{layer}.attention.self.{part}.bias"] = torch.tensor(1.0)
    elif how == "factors":
        state[f"{layer}.layer_scale_parameters"] = torch.ones(64)
    elif how == "mixed":
        state["levels.1.blocks.0.norm1.weight"] = state.pop(f"{layer}.layernorm_before.weight")
    elif how == "twice":
        state["dinat.layernorm.weight"] = torch.ones(256)
    elif how == "block":
        state = {key: x for key, x in state.items() if not key.startswith(layer)}
    return state


BROKEN = {
    "missing": r"missing nat\.encoder\.levels\.1\.layers\.0\.attention\.self\.key\.weight",
    "misshapen": r"key\.bias, .* alike, got \[64\] .*, \[3\] ",
    "scalar": r"query\.bias, .* alike, got \[\] ",
    "factors": r"layer_scale_parameters: expected shape \[2, C\], got \[64\]",
    "mixed": r"throughout, got levels\.1\.blocks\.0\.norm1\.weight too",
    "twice": r"both called layernorm\.weight",
    "block": r"missing: levels\.1\.blocks\.0\.",
}


@pytest.mark.parametrize("how", BROKEN)
def test_transformers_parts_and_mixtures_are_refused(how):
    model = randomized(timm.create_model("nat_atto", layer_scale=0.1))
    state = broken(nat.to_transformers(model.state_dict(), model), how)
    with pytest.raises(CheckpointError, match=BROKEN[how]):
        checkpoints.load(timm.create_model("nat_atto", layer_scale=0.1), state)


def test_transformers_have_no_place_for_other_networks():
    model = timm.create_model("dinat_s_atto")
    with pytest.raises(CheckpointError, match=r"layers\.0\..*: transformers' .* no such tensor"):
        to_transformers(model.state_dict(), model)
    model = timm.create_model("nat_atto", layer_scale=0.1)
    state = model.state_dict()
    with pytest.raises(CheckpointError, match=r"missing levels\.0\.blocks\.0\.gamma2"):
        nat.to_transformers({"levels.0.blocks.0.gamma1": state["levels.0.blocks.0.gamma1"]}, model)
    with pytest.raises(CheckpointError, match=r"expected three projections, got shape \[7\]"):
        dinat.to_transformers({"levels.0.blocks.0.attn.qkv.bias": torch.ones(7)}, model)


# Other sizes


RESIZED = {
    "nat_atto": {"kernel_size": (3, 7, 5, 9)},
    "dinat_atto": {"kernel_size": 7, "dilations": 1},
    "dinat_s_atto": {"kernel_size": (7, 5, 5, 5), "dilations": 1},
    "dinat_isotropic_atto": {"kernel_size": 7, "dilation": 1},
    "vitrpb_atto": {"img_size": (96, 48)},
    "agent_deit_atto": {"img_size": (96, 160)},
    "agent_pvt_atto": {"img_size": (96, 160)},
    "agent_swin_atto": {"img_size": (96, 160), "window_size": 5},
    "agent_cswin_atto": {"img_size": (96, 160)},
    "fused_swin_atto": {"window_size": 7, "img_size": 96},
}


def test_every_family_that_resizes_is_here():
    resizing = {name for name in ATTOS if hasattr(entries()[name], "_RESIZES")}
    without_tables = {"fused_swinv2_atto", "fused_davit_atto"}
    assert resizing == {*RESIZED} | without_tables


@pytest.mark.parametrize("name", RESIZED)
def test_exactly_what_is_listed_is_resized(name):
    family = entries()[name]
    state = randomized(timm.create_model(name)).state_dict()
    model = timm.create_model(name, **RESIZED[name])
    expected = {key: x.shape for key, x in model.state_dict().items()}
    found = checkpoints.convert(state, model)
    assert {key: x.shape for key, x in found.items()} == expected
    listed = {k for k in state if any(fnmatchcase(k, pattern) for pattern in family._RESIZES)}
    changed = {key for key, x in state.items() if not torch.equal(x, found[key])}
    assert changed == {key for key in state if state[key].shape != expected[key]}
    assert changed
    assert changed <= listed
    for pattern in family._RESIZES:
        if not name.startswith("agent"):  # whose hosts differ
            assert any(fnmatchcase(key, pattern) for key in changed), pattern

    longer = {key: torch.cat([x, x[:1]]) if x.ndim else x for key, x in state.items()}
    for key, x in checkpoints.convert(longer, model).items():
        assert key in listed or x is longer[key], key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kernels_of_another_size(dtype):
    """7 x 7 to 11 x 11, as the authors' tables of dinat_large were made."""
    torch.manual_seed(0)
    model = timm.create_model("dinat_large_11x11", device="meta")
    name = "levels.1.blocks.2.attn.rpb"
    table = torch.randn(12, 13, 13).to(dtype)
    found = dinat.checkpoint_filter_fn({name: table}, model)[name]
    exact = torch.promote_types(dtype, torch.float32)
    expected = F.interpolate(table.to(exact)[None], (21, 21), mode="bicubic", align_corners=False)
    assert found.dtype == dtype
    assert torch.equal(found, expected[0].to(dtype))
    shape = dinat.checkpoint_filter_fn({name: torch.empty(12, 13, 13, device="meta")}, model)[name]
    assert shape.is_meta
    assert list(shape.shape) == [12, 21, 21]


@pytest.mark.parametrize("shape", [(11, 13, 13), (12, 15, 15), (12, 13, 9), (12, 1, 1), (13, 13)])
def test_what_is_no_table_of_a_kernel_stays_misshapen(shape):
    model = timm.create_model("dinat_large_11x11", device="meta")
    table = torch.empty(shape, device="meta")
    assert_stays(model, model.state_dict(), "levels.1.blocks.2.attn.rpb", table)


def assert_stays(model, state, name, table):
    found = checkpoints.convert({**state, name: table}, model)
    assert found[name] is table
    assert checkpoints.compare(found, model).misshapen.keys() == {name}


@torch.no_grad()
def test_a_pretrained_model_takes_another_kernel_from_a_file(tmp_path):
    model = randomized(create("nat_atto"))
    torch.save(model.state_dict(), tmp_path / "nat.pth")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "nat.pth")}, "pretrained": True}
    other = timm.create_model("nat_atto", kernel_size=7, **overlay)
    table = model.levels[1].blocks[0].attn.rpb
    expected = F.interpolate(table[None], (13, 13), mode="bicubic")[0]
    assert torch.equal(other.levels[1].blocks[0].attn.rpb, expected)
    assert torch.equal(other.levels[0].blocks[0].attn.rpb, model.levels[0].blocks[0].attn.rpb)
    with pytest.raises(CheckpointError, match=r"misshapen: levels\.0\.blocks\.0\.attn\.rpb"):
        timm.create_model("nat_atto", kernel_size=1, **overlay)


def test_swins_tables_are_resized_as_whoever_made_the_file_does_it():
    model = timm.create_model("fused_swin_atto", window_size=7, img_size=96)
    timms = randomized(timm.create_model("fused_swin_atto")).state_dict()
    family = entries()["fused_swin_atto"]
    authors = family._RENAMES.to_authors(timms)
    assert authors.keys() != timms.keys()
    found = [checkpoints.convert(state, model) for state in (timms, authors)]
    name = "layers.1.blocks.1.attn.relative_position_bias_table"
    bicubic = F.interpolate(timms[name].T.reshape(1, 4, 7, 7), (13, 13), mode="bicubic")
    assert torch.equal(found[1][name], bicubic[0].flatten(1).T)
    theirs = timm.models.swin_transformer.checkpoint_filter_fn(timms, model)
    assert torch.equal(found[0][name], theirs[name])
    assert not torch.allclose(found[0][name], found[1][name])


@pytest.mark.parametrize("shape", [(3, 14, 15), (15, 15)])
def test_what_is_no_table_of_a_map_stays_misshapen(shape):
    model = timm.create_model("vitrpb_atto", img_size=96)
    state = timm.create_model("vitrpb_atto").state_dict()
    assert_stays(model, state, "layers.1.attn.rpb", torch.ones(shape))


@pytest.mark.parametrize("entry", ["fused_swin_atto", "agent_swin_atto"])
@pytest.mark.parametrize("shape", [(48, 4), (25, 3), (25,), (5, 5, 4), (36, 4)])
def test_what_is_no_table_of_a_window_stays_misshapen(entry, shape):
    model = timm.create_model(entry, window_size=7, img_size=96)
    state = timm.create_model(entry, window_size=7, img_size=96).state_dict()
    name = "layers.2.blocks.1.attn.relative_position_bias_table"
    assert_stays(model, state, name, torch.ones(shape))


def test_axes_of_other_agents_are_not_resized():
    """A table of as many numbers, of other heads and agents, is not made to fit."""
    state = timm.create_model("agent_pvt_atto").state_dict()
    name = "block2.0.attn.ah_bias"
    assert state[name].shape == (1, 2, 9, 8, 1)
    model = timm.create_model("agent_pvt_atto", img_size=96)
    state = model.state_dict()
    assert_stays(model, state, name, torch.ones(1, 9, 2, 8, 1))
    assert_stays(model, state, "pos_embed2", torch.ones(1, 65, 64))


# Detectors


@torch.no_grad()
@pytest.mark.parametrize("wrap", ["mmcv", "parallel", "detectron2"])
@pytest.mark.parametrize("name", DENSE)
def test_detectors_of_the_authors_load(name, wrap, tmp_path):
    """What stands around the backbone, and constants in it, are passed over."""
    family = entries()[name]
    source = randomized(FeatureBackbone(name, task="det"))
    authors = family._RENAMES.to_authors(source.model.state_dict()) | family._BUFFERS(source.model)
    detector = {f"backbone.{key}": x for key, x in authors.items()}
    detector |= {"neck.fpn_convs.0.conv.weight": torch.ones(2), "roi_head.fc.bias": torch.ones(2)}
    if wrap == "parallel":
        detector = {f"module.{key}": x for key, x in detector.items()}
    key = "model" if wrap == "detectron2" else "state_dict"
    torch.save({"meta": {"CLASSES": ("cat",), "epoch": 36}, key: detector}, tmp_path / "det.pth")
    backbone = FeatureBackbone(name, task="det", checkpoint=tmp_path / "det.pth")
    assert same(backbone.state_dict(), source.state_dict())
    x = image((64, 64))
    for y, expected in zip(backbone.eval()(x), source(x), strict=True):
        assert torch.equal(y, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE)
def test_classifiers_of_the_authors_load_into_detectors(name):
    """Constants of other maps and the classifier are passed over; new norms keep their values."""
    family = entries()[name]
    kwargs = {"img_size": 128} if name == "fused_swin_atto" else {}  # no window is clamped
    model = randomized(timm.create_model(name, **kwargs))
    authors = family._RENAMES.to_authors(model.state_dict()) | family._BUFFERS(model)
    backbone = FeatureBackbone(name, task="det")
    fresh = {key: x.clone() for key, x in backbone.state_dict().items()}
    report = checkpoints.load(backbone, {"model": authors})
    assert all("norm" in key or key.startswith("head.") for key in report.ignored)
    for key, x in backbone.state_dict().items():
        expected = model.state_dict().get(key.removeprefix("model."), fresh[key])
        assert torch.equal(x, expected), key


def test_tables_of_a_classifier_fit_a_detector_of_another_size():
    """Which the family's own rules do, though the dense form is not its model."""
    for name in ("agent_pvt_atto", "agent_swin_atto"):
        model = randomized(timm.create_model(name))
        backbone = FeatureBackbone(name, task="det", img_size=(96, 160))
        checkpoints.load(backbone, model.state_dict())
        model.set_input_size((96, 160))
        for key, x in backbone.state_dict().items():
            if "norm" not in key.split(".")[1]:
                assert torch.equal(x, model.state_dict()[key.removeprefix("model.")]), key


def test_every_family_says_what_its_authors_store():
    for name in ATTOS:
        family = entries()[name]
        assert isinstance(family._RENAMES, checkpoints.Renames)
        assert [*inspect.signature(family._BUFFERS).parameters] == ["model"]
        assert all(isinstance(rule, str) for rule in getattr(family, "_RESIZES", {}).values())
