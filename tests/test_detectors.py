"""Released detectors: files in the authors' names go into mmdet's models whole, or not at all."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path

import golden
import pytest
import torch

pytest.importorskip("mmdet")

from detectors import CHANNELS, GOLDENS, RECIPES, built, entry_of, head_of, of_each, parsed, shrunk

from vitarium.backbones._registry import entries
from vitarium.checkpoints import CheckpointError
from vitarium.heads.mmdet import load_detector
from vitarium.heads.mmdet.detectron2 import _NAMES, from_detectron2

GOLDEN_DETECTORS = Path(__file__).parent / "golden" / "detection"
RELEASED = [x.name for x in RECIPES if x.released is not None and entry_of(x.name) in GOLDENS]
QUICK = {*of_each("head", "family")}
# What mmdet 2.x calls the tensors of heads and of the pyramid, by the number of levels in it.
MASK_RCNN = {
    *("rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg"),
    *("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"),
    *(f"roi_head.bbox_head.shared_fcs.{i}" for i in range(2)),
    *(f"roi_head.mask_head.convs.{i}.conv" for i in range(4)),
    *("roi_head.mask_head.upsample", "roi_head.mask_head.conv_logits"),
    *(f"neck.{kind}_convs.{i}.conv" for kind in ("lateral", "fpn") for i in range(4)),
}
CASCADE_MASK_RCNN = {
    *(x for x in MASK_RCNN if not x.startswith("roi_head.")),
    *(f"roi_head.bbox_head.{i}.{fc}" for i in range(3) for fc in ("fc_cls", "fc_reg")),
    *(f"roi_head.bbox_head.{i}.shared_fcs.0" for i in range(3)),
    *(f"roi_head.bbox_head.{i}.shared_convs.{j}.conv" for i in range(3) for j in range(4)),
    *(f"roi_head.bbox_head.{i}.shared_convs.{j}.bn" for i in range(3) for j in range(4)),
    *(f"roi_head.mask_head.{i}.convs.{j}.conv" for i in range(3) for j in range(4)),
    *(f"roi_head.mask_head.{i}.{x}" for i in range(3) for x in ("upsample", "conv_logits")),
}
RETINANET = {
    *(f"bbox_head.{kind}_convs.{i}.conv" for kind in ("cls", "reg") for i in range(4)),
    *("bbox_head.retina_cls", "bbox_head.retina_reg"),
    *(f"neck.lateral_convs.{i}.conv" for i in range(3)),
    *(f"neck.fpn_convs.{i}.conv" for i in range(5)),
}
LAYERS = {
    "mask_rcnn": MASK_RCNN,
    "cascade_mask_rcnn": CASCADE_MASK_RCNN,
    "retinanet": RETINANET,
}
META = {"mmdet_version": "2.19.0", "CLASSES": ("person", "bicycle"), "epoch": 36, "seed": None}


def owners(names):
    return {name.rpartition(".")[0] for name in names if not name.startswith("backbone.")}


@pytest.mark.parametrize(
    "name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in RELEASED]
)
def test_every_released_detector_fits_its_config(name):
    description = json.loads(GOLDENS[entry_of(name)].read_text())
    model = built(parsed(name), "meta")
    heads = {k: x for k, x in model.state_dict().items() if not k.startswith("backbone.")}
    assert owners(heads) == LAYERS[head_of(name)]
    shapes = {**description["tensors"], **description["constants"]}
    theirs = {f"backbone.{k}": torch.empty(x, device="meta") for k, x in shapes.items()}
    for key in list(theirs):  # counters and tables of indices are whole numbers
        if key.endswith(("num_batches_tracked", "relative_position_index")):
            theirs[key] = theirs[key].long()
    report = load_detector(model, {"meta": META, "state_dict": theirs | heads, "optimizer": {}})
    assert {*report.matched} == {*model.state_dict()}
    left = {key.split(".")[1] for key in report.ignored}
    assert left <= ({"norm0"} if head_of(name) == "retinanet" else set())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("none")


def detector(name, root, seed=0):
    """A shrunk detector with weights of its own."""
    torch.manual_seed(seed)
    model = built(shrunk(name, root))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor))
    return model


def authors(model):
    """Its tensors as the authors' program would have saved them."""
    state = {k: x.clone() for k, x in model.state_dict().items()}
    inner = {k.removeprefix("backbone.model."): x for k, x in state.items() if "backbone." in k}
    family = entries()[model.backbone.pretrained_cfg["architecture"]]
    theirs = family._RENAMES.to_authors(inner) | family._BUFFERS(model.backbone.model)
    heads = {k: x for k, x in state.items() if not k.startswith("backbone.")}
    return OrderedDict({f"backbone.{k}": x for k, x in theirs.items()} | heads)


def equal(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def mmcv_average(state):
    """mmcv's EMAHook keeps a second copy as buffers with names of their own."""
    return state | {f"ema_{k.replace('.', '_')}": torch.zeros_like(x) for k, x in state.items()}


WRAPPED = {
    "plain": lambda state: state,
    "mmdet 2": lambda state: {"meta": META, "state_dict": state, "optimizer": {"state": {}}},
    "mmdet 3": lambda state: {
        "meta": {"mmengine_version": "0.10.7", "cfg": ""},
        "state_dict": state,
    },
    "parallel": lambda state: {"state_dict": {f"module.{k}": x for k, x in state.items()}},
    "averaged": lambda state: {"meta": META, "state_dict": mmcv_average(state)},
}
ONE_EACH = of_each("family")


@pytest.mark.parametrize("name", ONE_EACH)
def test_values_arrive_where_they_belong(name, root, tmp_path):
    source, model = detector(name, root), detector(name, root, seed=1)
    path = tmp_path / "detector.pth"
    torch.save({"meta": META, "state_dict": authors(source)}, path)
    report = load_detector(model, path)
    assert len(report.matched) == len(model.state_dict())
    assert equal(model, source)


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_surrounds_the_tensors(kind, root, tmp_path):
    name = "mask_rcnn_nat_mini_1x_coco"
    source, model = detector(name, root), detector(name, root, seed=1)
    path = tmp_path / "detector.pth"
    torch.save(WRAPPED[kind](authors(source)), path)
    report = load_detector(model, path)
    assert equal(model, source)
    assert (len(report.ignored) > 0) == (kind == "averaged")


def test_our_own_names_load_too(root):
    name = "mask_rcnn_nat_mini_1x_coco"
    source, model = detector(name, root), detector(name, root, seed=1)
    load_detector(model, source.state_dict())
    assert equal(model, source)


def test_counters_that_old_files_lack(root):
    name = "cascade_mask_rcnn_nat_mini_3x_coco"
    source, model = detector(name, root), detector(name, root, seed=1)
    state = {k: x for k, x in authors(source).items() if not k.endswith("num_batches_tracked")}
    load_detector(model, state)
    assert equal(model, source)


@pytest.mark.parametrize("name", ["retinanet_nat_mini_1x_coco", "retinanet_biformer_small_1x_coco"])
def test_a_norm_that_no_output_depends_on_is_left(name, root):
    source, model = detector(name, root), detector(name, root, seed=1)
    norm = "backbone.norm0" if "nat" in name else "backbone.extra_norms.0"
    state = authors(source) | {f"{norm}.{leaf}": torch.ones(32) for leaf in ("weight", "bias")}
    report = load_detector(model, state)
    assert equal(model, source)
    assert {*report.ignored} == {f"{norm}.weight", f"{norm}.bias"}


def test_mmengine_loads_the_authors_names(root, tmp_path):
    from mmengine.runner import load_checkpoint

    name = "mask_rcnn_fused_swin_tiny_patch4_window7_224_1x_coco"
    source, model = detector(name, root), detector(name, root, seed=1)
    path = tmp_path / "detector.pth"
    torch.save({"meta": META, "state_dict": authors(source)}, path)
    load_checkpoint(model, str(path), strict=True)
    assert equal(model, source)


def test_mmengine_says_what_does_not_fit(root):
    from mmengine.runner.checkpoint import load_state_dict

    source, model = detector(ONE_EACH[0], root), detector(ONE_EACH[-1], root)
    with pytest.raises(RuntimeError, match=r"unexpected key.*backbone\.levels"):
        load_state_dict(model, authors(source), strict=True)


MASK2FORMER = "mask2former_dinat_large_11x11_100e_coco_panoptic"


def mask2former_head(settings):
    """mmdet's head as its config has it, with the numbers of a golden."""
    head = parsed(MASK2FORMER).model.panoptic_head
    classes, features = settings["num_classes"], settings["hidden_dim"]
    head.update(num_things_classes=classes - 3, num_stuff_classes=3, feat_channels=features)
    head.update(out_channels=settings["mask_dim"], num_queries=settings["num_queries"])
    head.in_channels = settings["in_channels"]
    head.loss_cls.class_weight = [1.0] * classes + [0.1]
    encoder, decoder = head.pixel_decoder.encoder, head.transformer_decoder
    for each in (head, head.pixel_decoder):
        each.positional_encoding.num_feats = features // 2
    for part, name in ((encoder, "encoder"), (decoder, "decoder")):
        part.num_layers = settings[f"{name}_layers"]
        for layer in part.layer_cfg.values():
            layer.embed_dims = features
            if "num_heads" in layer:
                layer.num_heads = settings["nheads"]
        part.layer_cfg.ffn_cfg.feedforward_channels = settings[f"{name}_dim_feedforward"]
    return head


def test_mask2former_of_detectron2_computes_what_the_authors_do():
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules

    description, expected = golden.load(GOLDEN_DETECTORS / "mask2former_1")
    register_all_modules(init_default_scope=True)
    model = torch.nn.Module()
    model.panoptic_head = MODELS.build(mask2former_head(description["constructor"]))
    names, ignored = from_detectron2(golden.state_dict(description), model)
    model.double().load_state_dict(names)
    assert not ignored
    maps = [golden.normal(x["seed"], x["shape"]) for x in description["inputs"].values()]
    samples = [DetDataSample(metainfo={"batch_input_shape": (96, 128)}) for _ in maps[0]]
    with torch.no_grad():
        classes, masks = model.panoptic_head.eval()(maps, samples)
    found = {"logits": classes[-1], "masks": masks[-1]}
    found |= {f"aux{i}.masks": x for i, x in enumerate(masks[:-1])}
    assert found.keys() == expected.keys()
    for key, out in found.items():
        assert [*out.shape] == description["output_shapes"][key]
        error = (golden.sample(out) - expected[key]).abs().max() / expected[key].std()
        assert error <= 1e-7, key


def detectron2(model):
    """A Mask2Former's tensors as detectron2 would have saved them."""
    theirs = _NAMES.to_authors(authors(model))
    assert not any("panoptic_head" in name for name in theirs)
    return {"model": {**theirs, "criterion.empty_weight": torch.ones(134)}, "iteration": 1}


def test_mask2former_of_detectron2_loads_whole(root, tmp_path):
    source, model = detector(MASK2FORMER, root), detector(MASK2FORMER, root, seed=1)
    path = tmp_path / "mask2former.pth"
    torch.save(detectron2(source), path)
    report = load_detector(model, path)
    assert equal(model, source)
    assert [*report.ignored] == ["criterion.empty_weight"]
    other = detector("mask2former_dinat_large_11x11_100e_coco_instance", root)
    before = {name: x.clone() for name, x in other.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"misshapen: panoptic_head.cls_embed.* expected \[81"
    ):
        load_detector(other, path)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_file_runs_nothing(root, tmp_path):
    name = "mask_rcnn_nat_mini_1x_coco"
    model = detector(name, root)
    path, made = tmp_path / "detector.pth", tmp_path / "made"
    torch.save({"meta": {"hook_msgs": Hostile(made)}, "state_dict": authors(model)}, path)
    with pytest.raises(CheckpointError):
        load_detector(model, path)
    assert not made.exists()


def of_ten_classes(state):
    return {
        k: x[:11] if k.endswith(("fc_cls.weight", "fc_cls.bias")) else x for k, x in state.items()
    }


def without_a_mask_head(state):
    return {k: x for k, x in state.items() if "mask_head" not in k}


def with_another_tensor(state):
    return state | {"roi_head.mask_iou_head.fc.weight": torch.ones(2)}


def with_whole_numbers(state):
    return state | {"rpn_head.rpn_cls.bias": state["rpn_head.rpn_cls.bias"].long()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            of_ten_classes,
            rf"2 misshapen: roi_head.bbox_head.fc_cls.weight expected \[81, {CHANNELS}\].*got \[11",
        ),
        (without_a_mask_head, r"12 missing: roi_head.mask_head"),
        (with_another_tensor, r"1 unexpected: roi_head.mask_iou_head.fc.weight"),
        (with_whole_numbers, r"1 misshapen: rpn_head.rpn_cls.bias"),
        (lambda state: {"meta": {"mmdet_version": "1.2.0"}, "state_dict": state}, "mmdet 1.x"),
        (lambda state: {"state_dict": {}}, "empty"),
    ],
)
def test_what_does_not_fit_changes_nothing(change, message, root):
    name = "mask_rcnn_nat_mini_1x_coco"
    model, before = detector(name, root), detector(name, root)
    state = authors(detector(name, root, seed=1))
    with pytest.raises(CheckpointError, match=message):
        load_detector(model, change(state))
    assert equal(model, before)


def test_what_is_to_be_skipped_stays(root):
    name = "mask_rcnn_nat_mini_1x_coco"
    source, model = detector(name, root), detector(name, root, seed=1)
    before = detector(name, root, seed=1)
    state, classes = of_ten_classes(authors(source)), "roi_head.bbox_head.fc_cls"
    report = load_detector(model, state, skip=[classes])
    assert {*report.ignored} == {f"{classes}.weight", f"{classes}.bias"}
    for key, value in model.state_dict().items():
        expected = before if key.startswith(classes) else source
        assert torch.equal(value, expected.state_dict()[key]), key
    del state[f"{classes}.bias"]
    load_detector(model, state, skip=[classes])
    with pytest.raises(CheckpointError, match=r"2 misshapen: roi_head.bbox_head.fc_cls"):
        load_detector(model, of_ten_classes(authors(source)), skip=["roi_head.mask_head"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("retinanet_nat_mini_1x_coco", "unexpected: .*bbox_head.cls_convs"),
        ("cascade_mask_rcnn_nat_mini_3x_coco", "unexpected: .*roi_head.bbox_head.0"),
        ("mask_rcnn_fused_davit_tiny_1x_coco", "missing: backbone.model"),
    ],
)
def test_another_detector(name, message, root):
    model = detector("mask_rcnn_nat_mini_1x_coco", root)
    before = detector("mask_rcnn_nat_mini_1x_coco", root)
    with pytest.raises(CheckpointError, match=message):
        load_detector(model, authors(detector(name, root, seed=1)))
    assert equal(model, before)
