"""FeatureBackbone in mmdet's detectors."""

import os
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")

import vitarium.heads.mmdet as package  # isort: skip  (before what needs operators)

import mmdet
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config

from vitarium.heads import features
from vitarium.heads.mmdet import FeatureBackbone

CONFIGS = os.path.join(os.path.dirname(mmdet.__file__), ".mim", "configs")


@pytest.fixture(scope="module")
def detector():
    """mmdet's Mask R-CNN around our backbone, with narrow heads."""
    register_all_modules()
    cfg = Config.fromfile(f"{CONFIGS}/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py").model
    cfg.backbone = {
        "type": "FeatureBackbone",
        "name": "nat_atto",
        "task": "det",
        "frozen_stages": 1,
    }
    channels = FeatureBackbone("nat_atto").channels
    cfg.neck.update(in_channels=list(channels), out_channels=32)
    cfg.rpn_head.update(in_channels=32, feat_channels=32)
    for extractor in (cfg.roi_head.bbox_roi_extractor, cfg.roi_head.mask_roi_extractor):
        extractor.out_channels = 32
    cfg.roi_head.bbox_head.update(in_channels=32, fc_out_channels=64, num_classes=3)
    cfg.roi_head.mask_head.update(in_channels=32, conv_out_channels=32, num_classes=3)
    cfg.train_cfg.rcnn.sampler.num = 64
    torch.manual_seed(0)
    return MODELS.build(cfg)


def samples(detector, mode):
    data = demo_mm_inputs(2, [[3, 96, 128], [3, 128, 96]], num_classes=3, with_mask=True)
    return detector(**detector.data_preprocessor(data, mode == "loss"), mode=mode)


def test_mask_rcnn_trains_and_predicts(detector):
    detector.train()
    before = {name: value.clone() for name, value in detector.backbone.state_dict().items()}
    detector.init_weights()
    for name, value in detector.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    loss, _ = detector.parse_losses(samples(detector, "loss"))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in detector.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert any(not p.requires_grad for p in detector.backbone.parameters())
    torch.optim.SGD(detector.parameters(), 0.01).step()
    detector.test_cfg.rcnn.score_thr = 0
    detector.eval()
    with torch.no_grad():
        first, second = samples(detector, "predict")
    assert len(first.pred_instances) == len(second.pred_instances) == 100
    assert first.pred_instances.masks.shape == (100, 96, 128)


@pytest.mark.parametrize("task", [None, "det"])
def test_state_dict_is_that_of_the_plain_backbone(task):
    ours = FeatureBackbone("nat_atto", task=task, out_indices=(1, 3))
    plain = features.FeatureBackbone("nat_atto", task=task, out_indices=(1, 3))
    ours.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 64)
    maps = ours.eval()(image)
    assert isinstance(maps, tuple)
    assert all(map(torch.equal, maps, plain.eval()(image)))


def test_a_checkpoint_is_loaded_once(tmp_path):
    plain = features.FeatureBackbone("nat_atto")
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "w.pth")
    pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "w.pth")}
    for kwargs in ({"checkpoint": tmp_path / "w.pth"}, {"init_cfg": pretrained}):
        ours = MODELS.build(dict(type="FeatureBackbone", name="nat_atto", **kwargs))
        ours.init_weights()
        for name, value in plain.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_frozen_stages():
    backbone = FeatureBackbone("nat_atto", frozen_stages=2)
    plain = features.FeatureBackbone("nat_atto")
    plain.freeze(2)
    trained = [name for name, p in plain.named_parameters() if p.requires_grad]
    assert [name for name, p in backbone.named_parameters() if p.requires_grad] == trained
    assert all(p.requires_grad for p in FeatureBackbone("nat_atto").parameters())


@pytest.mark.parametrize("norm_eval", [False, True])
def test_norm_eval(norm_eval):
    backbone = FeatureBackbone("resnet10t", norm_eval=norm_eval).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(m.training != norm_eval for m in norms)
    assert backbone.training
    assert all(p.requires_grad for p in backbone.parameters())


def test_with_cp():
    image = torch.randn(1, 3, 64, 64)
    slopes = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = FeatureBackbone("nat_atto", with_cp=with_cp).train()
        sum(y.mean() for y in backbone(image)).backward()
        slopes.append([p.grad for p in backbone.parameters()])
    assert backbone.model.model.grad_checkpointing
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*slopes, strict=True))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "nat_mnii"}, "name: .* got 'nat_mnii'; did you mean nat_mini"),
        ({"name": "nat_mini.shi_in1"}, "did you mean .*nat_mini.shi_in1k"),
        ({"name": "#"}, "got '#'$"),
        ({"frozen_stages": 0}, "frozen_stages: expected -1"),
        ({"frozen_stages": 5}, "expected True or 0 to 4 stages, got 5"),
        ({"init_cfg": {"type": "Kaiming", "layer": "Conv2d"}}, "init_cfg: expected None or"),
        (
            {"init_cfg": {"type": "Pretrained", "checkpoint": "a"}, "checkpoint": "b"},
            "checkpoint: expected None beside init_cfg, got 'b'",
        ),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FeatureBackbone(**{"name": "nat_atto", **kwargs})


def test_without_mmdet(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmdet", None)
    message = r'^mmdet is not installed: pip install "vitarium\[det\]"$'
    with pytest.raises(ModuleNotFoundError, match=message):
        runpy.run_path(package.__file__)


@pytest.mark.slow
def test_a_config_needs_one_line(tmp_path):
    """In a fresh process, where nothing but the config imports vitarium."""
    (tmp_path / "c.py").write_text(
        'custom_imports = dict(imports=["vitarium.heads.mmdet"])\n'
        'model = dict(type="FeatureBackbone", name="nat_atto")\n'
    )
    code = (
        "import sys; from mmengine.config import Config; cfg = Config.fromfile(sys.argv[1]);"
        "from mmdet.utils import register_all_modules; register_all_modules();"
        "from mmdet.registry import MODELS; print(type(MODELS.build(cfg.model)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c.py")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("<class 'vitarium.heads.mmdet.backbone.FeatureBackbone'>\n")
