"""Agent Attention in its hosts: biases for maps of all sizes, what is kept, dense forms."""

import pytest
import timm
import torch
import torch.nn.functional as F

from vitarium import checkpoints
from vitarium.backbones import agent
from vitarium.heads.features import FeatureBackbone

HOSTS = ("deit", "pvt", "swin", "cswin")


def create(host, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f"agent_{host}_atto", **kwargs).eval()


def biases_of(model):
    return [module for module in model.modules() if isinstance(module, agent.AgentBiases)]


def tables(num_agents=9, size=(6, 5), class_token=False):
    torch.manual_seed(0)
    return agent.AgentBiases(16, 2, num_agents, size, class_token, dtype=torch.float64).eval()


def by_the_authors(x, size, grid):
    """Sums at the size that the tables are made for, then over the map, then over the agents."""

    def resized(maps):
        maps = F.interpolate(maps, size, mode="bilinear").flatten(2)
        maps = F.interpolate(maps.mT.unflatten(2, x.grid_size), grid, mode="bilinear")
        return maps.flatten(2).mT

    rows, columns = x.ha_bias[0].permute(0, 3, 1, 2), x.wa_bias[0].permute(0, 3, 1, 2)
    agents = resized(x.an_bias) + resized((x.ah_bias + x.aw_bias)[0])
    return agents, (resized(x.na_bias) + resized(rows + columns)).mT


# Biases


@pytest.mark.parametrize("grid", [(3, 3), (5, 4), (2, 7)])
@pytest.mark.parametrize("size", [(6, 5), (9, 14), (1, 1), (4, 3)])
@torch.no_grad()
def test_biases_of_any_map_and_any_agents(size, grid):
    x = tables()
    x.agent_size = grid
    for found, expected in zip(
        x.biases(size, torch.float64), by_the_authors(x, size, grid), strict=True
    ):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_the_class_token_has_biases_of_its_own():
    x = tables(class_token=True)
    agents, tokens = x.biases((6, 5), torch.float64)
    assert agents.shape == (2, 9, 31)
    assert tokens.shape == (2, 31, 9)
    assert torch.equal(agents[..., :1], x.ac_bias[0])
    assert torch.equal(tokens[:, :1], x.ca_bias[0])


@pytest.mark.parametrize("host", HOSTS)
def test_numbers_of_agents_are_squares(host):
    wrong = 8 if host == "deit" else (4, 9, 15, 16)
    if host == "cswin":
        wrong = (3, 9, 16, 16)
    with pytest.raises(ValueError, match=r"num_agents: expected squares, got (8|15|3)"):
        create(host, num_agents=wrong)


def test_other_wrong_arguments():
    with pytest.raises(ValueError, match=r"num_agents: expected one per stage \(4\), got \(9, 9\)"):
        create("pvt", num_agents=(9, 9))
    with pytest.raises(ValueError, match=r"agent_depths: expected 0 to \(1, 1, 3, 1\), got \(2, 1"):
        create("swin", agent_depths=(2, 1, 1, 0))
    with pytest.raises(ValueError, match=r"agent_depths: .*, got \(1, 1\)"):
        create("cswin", agent_depths=(1, 1))
    with pytest.raises(ValueError, match="num_agent_blocks: expected 0 to 4, got 5"):
        create("deit", num_agent_blocks=5)
    with pytest.raises(ValueError, match="embed_dims: expected one per stage"):
        create("pvt", embed_dims=(32, 64))


# What is kept


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_biases_are_composed_once_in_evaluation(host, monkeypatch):
    model, x = create(host), torch.randn(1, 3, 64, 64)
    composed, count = [], len(biases_of(model))
    compose = agent.AgentBiases._compose

    def spy(self, *args):
        composed.append(args)
        return compose(self, *args)

    monkeypatch.setattr(agent.AgentBiases, "_compose", spy)
    keys = set(model.state_dict())
    first = model(x)
    assert torch.equal(model(x), first)
    assert len(composed) == count
    assert set(model.state_dict()) == keys
    model(torch.randn(1, 3, 48, 80))
    assert len(composed) == 2 * count
    model.train()(x)
    model(x)
    assert len(composed) == 4 * count


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_new_tables_count_at_once(host):
    """However they get there."""
    x = torch.randn(1, 3, 64, 64)
    torch.manual_seed(1)
    other = timm.create_model(f"agent_{host}_atto").eval()
    ours = {k: v for k, v in other.state_dict().items() if k.endswith("_bias")}
    for assign in (False, True):
        model = create(host)
        before = model(x)
        model.load_state_dict(ours, strict=False, assign=assign)
        fresh = create(host)
        fresh.load_state_dict(ours, strict=False)
        assert torch.equal(model(x), fresh(x))
        assert not torch.equal(model(x), before)
        biases_of(model)[0].an_bias.mul_(2)
        biases_of(fresh)[0].an_bias.mul_(2)
        assert torch.equal(model(x), fresh(x))
    rounded = create(host)
    rounded(x)
    rounded.bfloat16().float()
    fresh = create(host)
    fresh.load_state_dict(rounded.state_dict())
    assert torch.equal(rounded(x), fresh(x))


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_what_one_mode_keeps_serves_another(first):
    model, x = create("pvt").requires_grad_(False), torch.randn(1, 3, 64, 64)
    with first():
        expected = model(x)
    x.requires_grad_()
    out = model(x)
    assert torch.equal(out.detach(), expected)
    out.sum().backward()
    assert x.grad.isfinite().all()


@torch.no_grad()
def test_tables_of_inference_mode_are_read_every_time():
    with torch.inference_mode():
        model, x = create("swin"), torch.randn(1, 3, 64, 64)
        before = model(x)
        biases_of(model)[0].an_bias.mul_(50)
        assert not torch.equal(model(x), before)


@torch.no_grad()
def test_what_is_kept_is_not_copied_and_not_compiled():
    model, x = create("deit"), torch.randn(1, 3, 64, 64)
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    for module in biases_of(model):
        module.an_bias.mul_(50)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(model(x), expected)


# Sizes


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_a_model_for_another_size_has_biases_as_on_the_fly(host):
    """Tables along an axis are resized linearly, at once or for good."""
    model, other = create(host), create(host)
    other.set_input_size((96, 160))
    for old, new in zip(biases_of(model), biases_of(other), strict=True):
        size = (new.ah_bias.shape[3], new.aw_bias.shape[4])
        assert size == (new.ha_bias.shape[2], new.wa_bias.shape[3])
        for x, y in zip(
            old.biases(size, torch.float32), new.biases(size, torch.float32), strict=True
        ):
            torch.testing.assert_close(x, y)
    x = torch.randn(1, 3, 96, 160)
    if host != "pvt":  # whose positions are resized bilinearly on the fly
        torch.testing.assert_close(model(x), other(x))
    before = {name: y.clone() for name, y in other.state_dict().items()}
    other.set_input_size()
    other.set_input_size((96, 160))
    assert all(torch.equal(y, before[name]) for name, y in other.state_dict().items())


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_a_checkpoint_of_another_size_is_resized(host):
    model, other = create(host), create(host, img_size=(96, 160))
    checkpoints.load(other, model.state_dict())
    model.set_input_size((96, 160))
    for name, x in model.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name


@torch.no_grad()
def test_windows_of_another_size():
    model = create("swin", window_size=5)
    name = "layers.2.blocks.1.attn.relative_position_bias_table"
    old = create("swin").state_dict()
    table = old[name].T.reshape(1, 4, 5, 5)
    checkpoints.load(model, old)
    expected = F.interpolate(table, (9, 9), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(model.state_dict()[name], expected)


@torch.no_grad()
def test_tags_know_their_images():
    for name, size in (
        ("agent_deit_small.leaplab_in1k_448", 448),
        ("agent_pvt_medium.leaplab_in1k_256", 256),
        ("agent_pvt_medium", 224),
        ("agent_swin_base_384", 384),
    ):
        model = timm.create_model(name, device="meta")
        assert model.input_size == (size, size)
        assert timm.create_model(name, device="meta", img_size=192).input_size == (192, 192)
        x = biases_of(model)[0]
        stride = 16 if "deit" in name else 4
        assert x.ah_bias.shape[3] == size // stride


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_incomplete_patches_are_completed_with_zeros(host):
    model, x = create(host), torch.randn(1, 3, 61, 49)
    maps = model.forward_intermediates(x, intermediates_only=True)
    side = 8 if host == "deit" else 4
    assert maps[0].shape[2:] == (-(-61 // side), -(-49 // side))


# Dense forms


@pytest.mark.parametrize("task", ["det", "seg"])
@pytest.mark.parametrize(("host", "sides"), [("pvt", (12, 16, 28, 28)), ("swin", (9, 12, 14))])
def test_dense_forms_have_more_agents(host, sides, task):
    backbone = FeatureBackbone(f"agent_{host}_atto", task=task)
    found = dict.fromkeys(x.agent_size for x in biases_of(backbone))
    assert [*found] == list(dict.fromkeys((side, side) for side in sides))
    assert biases_of(backbone)[0].grid_size == (2, 2)


@torch.no_grad()
def test_dense_pvt_drops_incomplete_patches():
    backbone = FeatureBackbone("agent_pvt_atto", task="det", out_indices=(1, 3)).eval()
    x = torch.randn(1, 3, 107, 75)
    maps = backbone(x)
    assert [tuple(y.shape[1:]) for y in maps] == [(64, 13, 9), (128, 3, 2)]
    for y, z in zip(backbone(x[..., :104, :72]), maps, strict=True):
        assert torch.equal(y, z)
    assert not any(name.startswith("model.norm") for name in backbone.state_dict())


@pytest.mark.parametrize("host", ["deit", "cswin"])
def test_hosts_without_a_dense_form(host):
    with pytest.raises(ValueError, match="task: expected None, .* has no form of its own"):
        FeatureBackbone(f"agent_{host}_atto", task="det")


@torch.no_grad()
def test_a_classifier_feeds_the_dense_forms():
    for host, norms in (("pvt", 0), ("swin", 8)):
        backbone = FeatureBackbone(f"agent_{host}_atto", task="det")
        report = checkpoints.load(backbone, create(host).state_dict())
        head = {name for name in report.ignored if name.startswith(("head.", "norm."))}
        assert set(report.ignored) == head != set()
        assert len([name for name in report.matched if name.startswith("model.norm")]) == norms


# Hosts


@torch.no_grad()
def test_deit_classifies_from_the_class_token():
    model, x = create("deit"), torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 65, 96)
    assert torch.equal(model(x), model.head(tokens[:, 0]))
    average = create("deit", global_pool="avg")
    expected = average.head(average.forward_features(x)[:, 1:].mean(1))
    torch.testing.assert_close(average(x), expected)


def test_the_last_blocks_of_deit_base_are_ordinary():
    model = timm.create_model("agent_deit_base", device="meta")
    kinds = [isinstance(block.attn, agent.AgentBiases) for block in model.blocks]
    assert kinds == [True] * 4 + [False] * 8


def test_blocks_of_swin_and_cswin():
    for name, expected in (
        ("agent_swin_tiny", ["AA", "AA", "AAAAAA", "BB"]),
        ("agent_swin_small_288", ["AA", "AA", "B" * 18, "BB"]),
        ("agent_swin_base", ["AA", "AA", "AA" + "B" * 16, "BB"]),
        ("agent_cswin_small", ["AAA", "A" * 6, "B" * 29, "BB"]),
    ):
        found = []
        for stage in timm.create_model(name, device="meta").feature_stages:
            blocks = getattr(stage, "blocks", stage)
            found.append("".join("A" if biases_of(block) else "B" for block in blocks))
        assert found == expected
