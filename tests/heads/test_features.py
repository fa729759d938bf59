"""FeatureBackbone: vitarium's and timm's models as lists of maps."""

import doctest
import io

import pytest
import timm
import torch
from servers import Reply, Server

from vitarium.backbones import nat
from vitarium.checkpoints import Weight
from vitarium.heads import features
from vitarium.heads.features import FeatureBackbone

SIZE = (64, 96)


def image():
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def assert_as_described(backbone, maps):
    assert [y.shape[1] for y in maps] == [*backbone.channels]
    for y, stride in zip(maps, backbone.strides, strict=True):
        assert [*y.shape[2:]] == [-(-n // stride) for n in SIZE]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "strides", "kwargs"),
    [
        ("nat_atto", (4, 8, 16, 32), {}),
        ("nat_atto.vitarium_digits", (4, 8, 16, 32), {}),
        ("resnet18", (2, 4, 8, 16, 32), {}),
        ("convnext_atto", (4, 8, 16, 32), {}),
        ("test_vit", (16, 16, 16), {"img_size": SIZE}),
    ],
)
def test_any_model(name, strides, kwargs):
    backbone = FeatureBackbone(name, **kwargs).eval()
    assert backbone.strides == strides
    assert_as_described(backbone, backbone(image()))


@torch.no_grad()
def test_maps_that_timm_gives_channels_last():
    backbone = FeatureBackbone("swin_s3_tiny_224", img_size=64, out_indices=(0, 2)).eval()
    maps = backbone(torch.zeros(1, 3, 64, 64))
    assert [tuple(y.shape) for y in maps] == [(1, 96, 16, 16), (1, 384, 4, 4)]
    assert all(y.is_contiguous() for y in maps)


@torch.no_grad()
@pytest.mark.parametrize(("indices", "taken"), [((0, 2), (0, 2)), ([1, -1], (1, 3)), ((3,), (3,))])
@pytest.mark.parametrize("task", [None, "det", "seg"])
def test_out_indices(indices, taken, task):
    torch.manual_seed(0)
    whole = FeatureBackbone("nat_atto", task=task).eval()
    torch.manual_seed(0)
    backbone = FeatureBackbone("nat_atto", out_indices=indices, task=task).eval()
    assert backbone.out_indices == taken
    maps, every = backbone(image()), whole(image())
    assert_as_described(backbone, maps)
    assert all(torch.equal(y, every[i]) for y, i in zip(maps, taken, strict=True))


@pytest.mark.parametrize("task", [None, "det"])
@pytest.mark.parametrize("out_indices", [None, (0, 2), (1,)])
def test_every_parameter_is_used(task, out_indices):
    backbone = FeatureBackbone("nat_atto", out_indices=out_indices, task=task)
    sum(y.square().sum() for y in backbone(image())).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_dense_form_norms_the_plain_maps():
    model = timm.create_model("nat_atto").eval()
    state = model.state_dict()
    plain = FeatureBackbone("nat_atto", checkpoint=state).eval()
    dense = FeatureBackbone("nat_atto", task="det", checkpoint=state).eval()
    expected = model.forward_intermediates(image(), intermediates_only=True)
    for i, (y, z, raw) in enumerate(zip(plain(image()), dense(image()), expected, strict=True)):
        assert torch.equal(y, raw)
        norm = torch.nn.LayerNorm(y.shape[1])
        torch.testing.assert_close(z, norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        assert f"model.norm{i}.weight" in dense.state_dict()
    assert not any(key.startswith(("model.norm.", "model.head")) for key in dense.state_dict())


def test_dense_form_checkpoints_gradients():
    backbone = FeatureBackbone("nat_atto", task="det")
    plain = backbone(image())[-1]
    backbone.model.set_grad_checkpointing()
    torch.testing.assert_close(backbone(image())[-1], plain)
    backbone(image())[-1].sum().backward()
    assert backbone.model.patch_embed.proj[0].weight.grad.any()


@torch.no_grad()
def test_checkpoint_of_the_classifier_for_fewer_maps():
    state = timm.create_model("nat_atto").state_dict()
    backbone = FeatureBackbone("nat_atto", out_indices=(0, 1), num_classes=0, checkpoint=state)
    key = "levels.1.blocks.1.mlp.fc2.weight"
    assert torch.equal(backbone.model.model.get_parameter(key), state[key])
    ignored = backbone.checkpoint_ignore()
    assert {"head.*", "norm.weight", "levels.1.downsample.norm.bias"} <= ignored.keys()
    assert not any(key.startswith("levels.1.blocks") for key in ignored)


@pytest.mark.parametrize("kwargs", [{}, {"task": "det"}])
def test_it_says_what_images_it_expects(kwargs):
    config = timm.data.resolve_model_data_config(FeatureBackbone("nat_atto", **kwargs))
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["input_size"] == (3, 64, 64)


def test_model_arguments_reach_the_model():
    backbone = FeatureBackbone("nat_atto", task="seg", in_chans=1, dtype=torch.float64)
    assert {p.dtype for p in backbone.parameters()} == {torch.float64}
    assert len(backbone(torch.zeros(1, 1, 32, 32, dtype=torch.float64))) == 4
    with pytest.raises(TypeError, match="window"):
        FeatureBackbone("nat_atto", window=7)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("nat_nano", {}, "name: expected a model of vitarium or timm, got 'nat_nano'"),
        ("nat_atto", {"task": "depth"}, "task: expected None or one of .*, got 'depth'"),
        ("resnet18", {"task": "det"}, "task: expected None, resnet18 has no form .* got 'det'"),
        ("nat_atto", {"out_indices": (0, 4)}, r"out_indices: .* nat_atto's 4 maps, got \(0, 4\)"),
        ("nat_atto", {"out_indices": (-5,)}, r"out_indices: .* got \(-5,\)"),
        ("nat_atto", {"out_indices": (2, 1)}, r"out_indices: .* got \(2, 1\)"),
        ("nat_atto", {"out_indices": (1, 1)}, r"out_indices: .* got \(1, 1\)"),
        ("nat_atto", {"out_indices": ()}, r"out_indices: .* got \(\)"),
        ("resnet18", {"out_indices": (2, 1)}, r"out_indices: .* resnet18's 5 maps, got \(2, 1\)"),
        ("resnet18", {"out_indices": (9,)}, r"out_indices: .* resnet18's maps, got \(9,\)"),
        ("test_vit", {"out_indices": (99,)}, r"out_indices: .* test_vit's maps, got \(99,\)"),
    ],
)
def test_refusals(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        FeatureBackbone(name, **kwargs)


def test_the_examples_run():
    assert doctest.testmod(features).attempted > 0
    assert doctest.testmod(features).failed == 0


def test_a_released_detector_by_name(cache, monkeypatch):
    source = FeatureBackbone("nat_atto", task="det")
    state = {key.replace("model.", "backbone.", 1): x for key, x in source.state_dict().items()}
    file = io.BytesIO()
    torch.save({"state_dict": {**state, "neck.weight": torch.ones(1)}}, file)
    name = "nat_atto.me_mask_rcnn_1x_coco"
    with Server({"/det.pth": Reply(file.getvalue())}) as server:
        weight = Weight(url=server.url("/det.pth"), task="det", wrapper="state_dict", licence="MIT")
        monkeypatch.setitem(nat._WEIGHTS, name, weight)
        assert FeatureBackbone(name).state_dict().keys() == source.state_dict().keys()
        assert not server.requests
        loaded = FeatureBackbone(name, pretrained=True).state_dict()
        FeatureBackbone(name, task="det", pretrained=True, cache_dir=cache)
        assert server.requests == ["/det.pth"]
    assert all(torch.equal(loaded[key], x) for key, x in source.state_dict().items())
    with pytest.raises(ValueError, match="task: expected None or 'det' of nat_atto.me_mask"):
        FeatureBackbone(name, task="seg")
    with pytest.raises(ValueError, match="checkpoint: expected None with the weights of nat_atto"):
        FeatureBackbone(name, pretrained=True, checkpoint=state)
    for own in ({"checkpoint_path": "x"}, {"pretrained_cfg_overlay": {"file": "x"}}):
        with pytest.raises(ValueError, match="expected none with the weights of nat_atto.me_mask"):
            FeatureBackbone(name, pretrained=True, **own)


def test_a_detector_s_norms_of_other_maps_are_left():
    whole = FeatureBackbone("nat_atto", task="det").state_dict()
    state = {key.replace("model.", "backbone.", 1): x for key, x in whole.items()}
    some = FeatureBackbone("nat_atto", out_indices=(1, 2), task="det", checkpoint=state)
    assert all(torch.equal(x, whole[key]) for key, x in some.state_dict().items())
    del state["backbone.norm2.weight"]
    with pytest.raises(ValueError, match=r"1 missing: model\.norm2\.weight"):
        FeatureBackbone("nat_atto", out_indices=(1, 2), task="det", checkpoint=state)
