"""Probes: the authors' numbers, the tokens of any model, and what stays frozen."""

import copy
import doctest
import io
import pickle
from pathlib import Path

import attos
import pytest
import timm
import torch
import torch.nn.functional as F
from golden import normal, op_case, sample
from torch import nn

from vitarium.heads import probing
from vitarium.heads.probing import POOLINGS, EfficientProbing, FrozenBackbone, Probe, probe_head

OPS = Path(__file__).parents[1] / "golden" / "ops"
EP = sorted(OPS.glob("efficient_probing_*.json"))
OTHERS = sorted(OPS.glob("pooling_*.json"))


def image(batch=2, size=(64, 64)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def tokens(batch=2, count=7, dim=64):
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(2))


# The poolings


def assert_golden(out, expected, what):
    error = (sample(out) - expected).abs().max() / expected.std()
    assert error <= 1e-7, f"{what}: {error:.1e} of the spread"


def loaded(module, description, parameters):
    """The module with a golden's tensors: those and its constants, and no other."""
    own = module.state_dict()
    constants = {name: own[name] for name in description["constants"]}
    module.double().eval().load_state_dict(parameters | constants)
    assert sum(p.numel() for p in module.parameters()) == description["num_params"]
    return module


@pytest.mark.parametrize("path", EP, ids=lambda path: path.stem)
def test_efficient_probing_is_the_authors(path):
    d, inputs, parameters, _, expected = op_case(path.with_suffix(""))
    dim, num_classes = d["tensors"]["0.cls_token"][2], d["tensors"]["2.bias"][0]
    head = probe_head(dim, num_classes, num_queries=d["num_queries"], d_out=d["d_out"])
    head = loaded(head, d, parameters)
    pooled, logits = head[0](inputs["x"]), head(inputs["x"])
    (logits * normal(d["grad"]["probe_seed"], d["outputs"]["logits"])).sum().backward()
    assert_golden(pooled, expected["pooled"], "pooled")
    assert_golden(logits, expected["logits"], "logits")
    assert_golden(inputs["x"].grad, expected["grad_x"], "gradient of x")
    for name in ("0.cls_token", "0.v.weight"):
        assert_golden(head.get_parameter(name).grad, expected[f"gradparam_{name}"], name)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_poolings_are_the_authors(path):
    d, inputs, parameters, probe, expected = op_case(path.with_suffix(""))
    pooling = POOLINGS[path.stem.split("_")[1]](inputs["x"].shape[-1])
    out = loaded(pooling, d, parameters)(inputs["x"])
    (out * probe).sum().backward()
    assert_golden(out, expected["out"], "out")
    assert_golden(inputs["x"].grad, expected["grad_x"], "gradient of x")


def test_every_pooling_of_the_authors_has_a_golden():
    found = {path.stem.split("_")[1] for path in OTHERS}
    assert found == POOLINGS.keys() - {"ep", "gap", "cls"}
    assert len(EP) == 2


@torch.no_grad()
def test_efficient_probing_by_its_formula():
    pooling, x = EfficientProbing(64, num_queries=4, d_out=2), tokens()
    assert pooling.out_features == 32
    weights = (pooling.cls_token[0] @ x.mT / 8).softmax(-1)  # [B, 4, N]
    slices = pooling.v(x).unflatten(-1, (4, 8))
    expected = torch.stack([(weights[:, j, :, None] * slices[:, :, j]).sum(1) for j in range(4)], 1)
    torch.testing.assert_close(pooling(x), expected.flatten(1), atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("name", POOLINGS)
def test_the_order_of_patches_does_not_matter(name, count):
    torch.manual_seed(0)
    pooling, x = POOLINGS[name](64).eval(), tokens(batch=1, count=count)
    out = pooling(x)
    assert out.shape == (1, pooling.out_features)
    moved = torch.cat([x[:, :1], x[:, 1:].flip(1)], 1) if name == "cls" else x.flip(1)
    torch.testing.assert_close(pooling(moved), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", POOLINGS)
def test_every_parameter_of_a_head_is_trained(name):
    torch.manual_seed(0)
    head = probe_head(64, 5, name)
    head(tokens(batch=8)).square().sum().backward()
    assert [key for key, p in head.named_parameters() if p.grad is None] == []
    assert {key: p.grad.any() for key, p in head.named_parameters() if not p.grad.any()} in (
        {},
        {"0.attention_predictor.2.bias": False},  # a softmax does not see what all tokens share
    )


@torch.no_grad()
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", POOLINGS)
def test_bfloat16(name, autocast):
    torch.manual_seed(0)
    head, x = probe_head(64, 5, name).eval(), tokens()
    expected = head(x)
    if not autocast:
        head, x = head.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = head(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", POOLINGS)
def test_a_head_compiles_and_exports(name):
    torch.manual_seed(0)
    head, x = probe_head(32, 5, name).eval(), tokens(dim=32)
    expected = head(x)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(head, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("ep", {"num_queries": 48}, r"num_queries: .* divisor of dim / d_out = 64 .* got 48"),
        ("ep", {"num_queries": 0}, r"num_queries: .* \(the nearest is 1\), got 0"),
        ("ep", {"d_out": 3}, r"d_out: .* divisor of dim = 64 \(the nearest is 2\), got 3"),
        ("ep", {"d_out": 4}, r"num_queries: .* dim / d_out = 16 \(the nearest is 16\), got 32"),
        ("aim", {"num_heads": 5}, r"num_heads: .* divisor of dim = 64 .* got 5"),
        ("jepa", {"num_heads": 5}, r"num_heads: .* divisor of dim = 64 .* got 5"),
        ("coca", {}, r"pooling: expected one of \('ep', .*'cls'\), got 'coca'"),
    ],
)
def test_heads_that_cannot_be(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        probe_head(64, 5, name, **kwargs)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        probe_head(64, 0)


# The tokens


SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
MODELS = [  # name, what else it takes, prefix tokens, class token, norm before the pooling
    ("test_vit", {"img_size": 64}, 1, True, True),
    ("test_vit", {"img_size": 64, "reg_tokens": 4}, 5, True, True),
    ("test_vit4", {"img_size": 64}, 1, False, False),  # a register only
    ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1}, 2, True, True),
    ("test_vit_relpos", {"img_size": 64}, 0, False, False),
    ("swin_tiny_patch4_window7_224", {"img_size": 64, **SWIN}, 0, False, True),
    ("test_mambaout", {}, 0, False, False),
    ("test_convnext", {}, 0, False, False),
    ("test_resnet", {}, 0, False, False),
    ("test_maxvit", {"img_size": 64}, 0, False, True),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "kwargs", "prefix", "has_class_token", "norm"), MODELS)
def test_tokens_of_timms_models(name, kwargs, prefix, has_class_token, norm):
    torch.manual_seed(0)
    everything = FrozenBackbone(name, "all", **kwargs)
    patches = FrozenBackbone(everything.model)
    assert patches.name == name
    assert patches.has_class_token == has_class_token
    x = everything(image())
    assert x.shape == (2, prefix + patches(image()).shape[1], everything.num_features)
    assert torch.equal(patches(image()), x[:, prefix:])
    [last] = everything.model.forward_intermediates(
        image(), indices=[-1], norm=norm, intermediates_only=True
    )
    torch.testing.assert_close(x[:, prefix:], last.flatten(2).mT)


@torch.no_grad()
@pytest.mark.parametrize("name", attos.ATTOS)
def test_tokens_of_the_zoo(name):
    model = attos.create(name, num_classes=0, global_pool="avg")
    backbone = FrozenBackbone(model)
    x, (height, width) = attos.image(batch=2), attos.map_sizes(model, attos.SIZE)[-1]
    out = backbone(x)
    assert out.shape == (2, height * width, backbone.num_features)
    [last] = model.forward_intermediates(x, indices=[-1], norm=True, intermediates_only=True)
    torch.testing.assert_close(out, last.flatten(2).mT)
    late = getattr(model.head, "norm", nn.Identity())  # where the norm follows the pooling
    attos.assert_same(late(out.mean(1)[..., None, None]).flatten(1), model(x))
    probe = Probe(model, 3, pooling_kwargs={"num_queries": 8})
    assert probe(x).shape == (2, 3)
    assert probe.tokens(x).equal(out)


@torch.no_grad()
def test_class_token():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64, reg_tokens=4, num_classes=0).eval()
    probe = Probe(model, 3, "cls").eval()
    assert probe.tokens(image()).shape == (2, 1 + 4 + 16, 64)
    torch.testing.assert_close(probe.head[0](probe.tokens(image())), model(image()))
    with pytest.raises(ValueError, match="tokens: expected None or 'all' .* got 'patch'"):
        Probe(model, 3, "cls", tokens="patch")
    with pytest.raises(ValueError, match="'cls', test_vit4 has no class token"):
        Probe("test_vit4", 3, "cls")
    with pytest.raises(ValueError, match="'cls', nat_atto has no class token"):
        Probe("nat_atto", 3, "cls")


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["patch", "all"])
def test_which_tokens_are_pooled(tokens):
    probe = Probe("test_vit", 3, "gap", tokens, img_size=64).eval()
    x = probe.backbone.model.forward_features(image())
    expected = x.mean(1) if tokens == "all" else x[:, 1:].mean(1)
    torch.testing.assert_close(probe.head[0](probe.tokens(image())), expected)


class Toy(nn.Module):
    """timm's protocol, as far as a probe needs it; its features are whatever it is told."""

    num_features = 8

    def __init__(self, *shape, **statements):
        super().__init__()
        self.shape = shape
        self.scale = nn.Parameter(torch.ones(()))
        for name, value in statements.items():
            setattr(self, name, value)

    def forward_features(self, x):
        count = torch.Size(self.shape).numel()
        return self.scale * torch.arange(float(count)).view(self.shape).expand(len(x), *self.shape)


@pytest.mark.parametrize(
    ("shape", "statement"),
    [
        ((8, 2, 3), {"output_fmt": "NCHW"}),
        ((2, 3, 8), {"output_fmt": "NHWC"}),
        ((6, 8), {"output_fmt": "NLC"}),
        ((6, 8), {"num_prefix_tokens": 0}),
        ((8, 2, 3), {"pretrained_cfg": {"pool_size": (2, 3)}}),
        ((8, 8, 8), {"output_fmt": "NHWC"}),  # no shape could tell
        ((8, 8, 8), {"output_fmt": "NCHW"}),
    ],
)
def test_models_of_ones_own(shape, statement):
    out = FrozenBackbone(Toy(*shape, **statement))(image())
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    first = "NCHW" in statement.values() or "pretrained_cfg" in statement
    expected = x.flatten(1).T if first else x.flatten(0, -2)
    assert torch.equal(out, expected.expand(2, -1, -1))


def test_models_whose_layout_cannot_be_told():
    with pytest.raises(ValueError, match="states the layout of its features, Toy does not"):
        FrozenBackbone(Toy(6, 8))
    with pytest.raises(ValueError, match="expected maps or tokens, Toy gives NCL"):
        FrozenBackbone(Toy(8, 6, output_fmt="NCL"))
    with pytest.raises(ValueError, match=r"of Toy as it states .* C = 8, got shape \(2, 8, 2, 3\)"):
        FrozenBackbone(Toy(8, 2, 3, output_fmt="NHWC"))(image())
    with pytest.raises(ValueError, match=r"of Toy as it states .* NLC .* got shape \(2, 2, 3, 8\)"):
        FrozenBackbone(Toy(2, 3, 8, num_prefix_tokens=1))(image())
    with pytest.raises(ValueError, match="timm's protocol, Linear has no forward_features"):
        FrozenBackbone(nn.Linear(2, 2))
    # timm's model of tokens that says so nowhere: a class token may be among them, or not
    with pytest.raises(ValueError, match="layout of its features, mixer_s32_224 does not"):
        Probe("mixer_s32_224", 3)
    model = timm.create_model("mixer_s32_224")
    model.output_fmt = "NLC"
    assert Probe(model, 3)(image(size=(224, 224))).shape == (2, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("nat_nano", 3), {}, "backbone: expected a model of vitarium or timm, got 'nat_nano'"),
        (("nat_atto", 3), {"tokens": "cls"}, "tokens: expected 'patch' or 'all', got 'cls'"),
        (("nat_atto", 3, "max"), {}, "pooling: expected one of .* got 'max'"),
        (("nat_atto", 0), {}, "num_classes: expected at least 1, got 0"),
        (("agent_deit_atto", 3), {"pooling_kwargs": {"num_queries": 64}}, "num_queries: .* got 64"),
        (
            (Toy(6, 8, output_fmt="NLC"), 3),
            {"depth": 1},
            "depth: expected no arguments for a model",
        ),
    ],
)
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Probe(*args, **kwargs)


# What is trained, and what is not


def test_the_backbone_is_frozen():
    torch.manual_seed(0)
    probe = Probe("test_resnet", 3, "gap", drop_path_rate=0.5, drop_rate=0.5).train()
    assert not any(module.training for module in probe.backbone.modules())
    assert all(module.training for module in probe.head.modules())
    before = copy.deepcopy(probe.state_dict())
    trained = [p for p in probe.parameters() if p.requires_grad]
    assert trained == [*probe.head.parameters()]
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1, weight_decay=0.1)
    x = image().requires_grad_()
    assert not probe.tokens(x).requires_grad
    F.cross_entropy(probe(x), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert x.grad is None
    changed = {k for k, y in probe.state_dict().items() if not torch.equal(y, before[k])}
    names = ("1.running_mean", "1.running_var", "1.num_batches_tracked", "2.weight", "2.bias")
    assert changed == {f"head.{name}" for name in names}
    assert not probe.eval().head.training


def test_a_given_model_is_frozen_itself():
    model = timm.create_model("nat_atto", drop_path_rate=0.5).train()
    probe = Probe(model, 3)
    assert probe.backbone.model is model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_the_head_alone_is_saved_and_loaded():
    torch.manual_seed(0)
    model = timm.create_model("nat_atto")
    source, target = Probe(model, 3).eval(), Probe(model, 3).eval()
    source.head[1].running_mean += 1
    assert not torch.equal(source(image()), target(image()))
    file = io.BytesIO()
    torch.save(source.head.state_dict(), file)
    file.seek(0)
    target.head.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(source(image()), target(image()))


@torch.no_grad()
def test_precision_of_the_head():
    probe = Probe("nat_atto", 3, dtype=torch.bfloat16)
    assert {p.dtype for p in probe.head.parameters()} == {torch.float32}
    assert probe.tokens(image().bfloat16()).dtype == torch.bfloat16
    out = probe(image().bfloat16())
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert probe.bfloat16()(image().bfloat16()).dtype == torch.bfloat16
    probe = Probe("nat_atto", 3, dtype=torch.float64)
    assert probe(image().double()).dtype == torch.float64
    assert {p.device.type for p in Probe("nat_atto", 3, device="meta").parameters()} == {"meta"}


@torch.no_grad()
def test_autocast():
    torch.manual_seed(0)
    probe = Probe("nat_atto", 3).eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = probe(image())
    torch.testing.assert_close(out.float(), probe(image()), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("size", [(33, 47), (32, 32)])
def test_odd_and_small_images(size):
    probe = Probe("nat_atto", 3)
    probe(image(size=size)).sum().backward()
    assert all(p.grad.isfinite().all() for p in probe.head.parameters())


def tiny():
    return timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=1)


def test_a_probe_exports_and_copies():
    torch.manual_seed(0)
    probe = Probe(tiny(), 3).eval()
    expected = probe(image())
    exported = torch.export.export(probe, (image(),)).module()
    torch.testing.assert_close(exported(image()), expected)
    assert torch.equal(copy.deepcopy(probe)(image()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(probe))(image()), expected)


@pytest.mark.parametrize(
    "build", [tiny, pytest.param(lambda: timm.create_model("nat_atto"), marks=pytest.mark.slow)]
)
def test_a_probe_compiles(build):
    torch.manual_seed(0)
    probe = Probe(build(), 3)
    compiled = torch.compile(probe, fullgraph=True, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(run(image()).square().sum(), [*probe.head.parameters()])
        for run in (compiled, probe)
    )
    for actual, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, gradient, atol=1e-5, rtol=1e-4)


def test_pretrained_weights_and_the_images_they_expect():
    probe = Probe("nat_atto.vitarium_digits", 10, pretrained=True)
    model = timm.create_model("nat_atto.vitarium_digits", pretrained=True)
    name = "levels.0.blocks.0.attn.qkv.weight"
    assert torch.equal(probe.backbone.model.get_parameter(name), model.get_parameter(name))
    config = timm.data.resolve_model_data_config(probe)
    assert config["input_size"] == (3, 64, 64)
    assert config["mean"] == (0.5, 0.5, 0.5)


def test_the_examples_run():
    result = doctest.testmod(probing, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["ep", "gap"])
def test_probes_learn_the_digits(pooling):
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.from_numpy(data.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    x, labels = F.interpolate(x, (64, 64), mode="bicubic"), torch.from_numpy(data.target)
    torch.manual_seed(0)
    probe = Probe("nat_atto.vitarium_digits", 10, pooling, pretrained=True)
    features = torch.cat([probe.tokens(part) for part in x.split(100)])
    optimizer = torch.optim.AdamW(probe.head.parameters(), lr=1e-2)
    for _ in range(10):
        for batch in torch.randperm(1437).split(100):
            optimizer.zero_grad()
            F.cross_entropy(probe.head(features[batch]), labels[batch]).backward()
            optimizer.step()
    found = probe.eval().head(features[1437:]).argmax(-1)
    assert (found == labels[1437:]).float().mean() > 0.9
