"""The isotropic models and the size of their images."""

import copy

import pytest
import timm
import torch
from timm.models import get_model_input_config

from vitarium import checkpoints

WINDOWS = "dinat_isotropic_atto"


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def tables(**kwargs):
    """A model whose position tables are as large as its map."""
    return create("vitrpb_atto", patch_size=8, **kwargs)


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (64, 64), (72, 40)])
@torch.no_grad()
def test_windows_take_any_size(size):
    model = create(WINDOWS)
    tokens = model.forward_features(torch.randn(1, 3, *size))
    assert tokens.shape[1:3] == (-(-size[0] // 8), -(-size[1] // 8))
    assert tokens.isfinite().all()


@torch.no_grad()
def test_incomplete_patches_are_completed_with_zeros():
    model, x = create(WINDOWS), torch.randn(1, 3, 61, 49)
    padded = torch.nn.functional.pad(x, (0, 7, 0, 3))
    assert torch.equal(model(x), model(padded))


@pytest.mark.parametrize("size", [96, (48, 80)])
@torch.no_grad()
def test_tables_fit_the_size_that_is_asked_for(size):
    height, width = (size, size) if isinstance(size, int) else size
    model = tables(img_size=size)
    assert model.layers[0].attn.rpb.shape == (3, height // 4 - 1, width // 4 - 1)
    assert model(torch.randn(2, 3, height, width)).isfinite().all()
    assert get_model_input_config(model)["input_size"] == (3, height, width)
    with pytest.raises(ValueError, match=rf"image: expected H, W = \({height}, {width}\).* 64, 64"):
        model(torch.randn(1, 3, 64, 64))


@torch.no_grad()
def test_attention_with_tables_is_what_the_formula_says():
    attn = tables(img_size=(16, 24), dtype=torch.float64).layers[0].attn
    x = torch.randn(1, 2, 3, 96, dtype=torch.float64)
    tokens = x.flatten(1, 2)[0]
    q, k, v = attn.qkv(tokens).unflatten(1, (3, 3, 32)).unbind(1)
    out = torch.zeros_like(q)
    for i in range(6):
        for head in range(3):
            bias = [
                attn.rpb[head, j // 3 - i // 3 + 1, j % 3 - i % 3 + 2] for j in range(6)
            ]  # key minus query
            weights = (k[:, head] @ q[i, head] / 32**0.5 + torch.stack(bias)).softmax(0)
            out[i, head] = weights @ v[:, head]
    expected = attn.proj(out.flatten(1))
    torch.testing.assert_close(attn(x).flatten(1, 2)[0], expected)


@torch.no_grad()
def test_a_checkpoint_of_another_size_has_its_tables_resized():
    model, other = tables(), tables(img_size=(96, 64))
    checkpoints.load(other, model.state_dict())
    model.set_input_size((96, 64))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    x = torch.randn(1, 3, 96, 64)
    assert torch.equal(model(x), other(x))
    overlay = {"state_dict": tables().state_dict()}
    kwargs = {"img_size": (96, 64), "pretrained": True, "pretrained_cfg_overlay": overlay}
    assert torch.equal(tables(**kwargs)(x), other(x))


@torch.no_grad()
def test_a_linear_table_stays_about_linear():
    """The centre of the old table is the centre of the new one, and nothing jumps."""
    model = tables()
    ramp = torch.arange(-7.0, 8.0).expand(3, 15, 15)
    model.layers[0].attn.rpb.copy_(ramp)
    model.set_input_size(128)
    row = model.layers[0].attn.rpb[0, 15]
    assert row.shape == (31,)
    torch.testing.assert_close(row[15], torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(row.diff()[5:-5], torch.full((20,), 15 / 31), atol=0.1, rtol=0)


@torch.no_grad()
def test_set_input_size_keeps_what_does_not_change():
    model = tables().to(torch.bfloat16)
    model.layers[1].attn.rpb.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    model.set_input_size()
    model.set_input_size(64)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    model.set_input_size((80, 64))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.layers[0].attn.rpb.requires_grad
    assert not model.layers[1].attn.rpb.requires_grad
    assert model(torch.randn(1, 3, 80, 64).bfloat16()).isfinite().all()

    windows = create(WINDOWS)
    before = copy.deepcopy(windows.state_dict())
    windows.set_input_size(100)
    assert all(torch.equal(x, before[key]) for key, x in windows.state_dict().items())
    assert get_model_input_config(windows)["input_size"] == (3, 100, 100)


@pytest.mark.parametrize("size", [65, (64, 60), 0, 4, (64,), "64", (64, 64, 64)])
def test_sizes_that_do_not_fit_the_patch(size):
    with pytest.raises(ValueError, match="img_size: expected .* multiples of the patch's 8, got"):
        tables(img_size=size)
    with pytest.raises(ValueError, match="img_size: expected .* multiples of the patch's 8, got"):
        tables().set_input_size(size)


def test_other_wrong_arguments():
    with pytest.raises(ValueError, match="img_size: expected .* at least the patch's 8, got 4"):
        create(WINDOWS, img_size=4)
    with pytest.raises(ValueError, match="dilation: expected 1 without a window .* got 2"):
        tables(dilation=2)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim = 96, got 5"):
        tables(num_heads=5)
    with pytest.raises(ValueError, match=r"image: expected \[B, 3, H, W\] with H, W >= 8"):
        create(WINDOWS)(torch.zeros(1, 3, 7, 64))
    with pytest.raises(ValueError, match="attn_drop_rate: expected 0"):
        tables(attn_drop_rate=0.1)


def test_tables_of_other_heads_are_refused():
    state_dict = tables(num_heads=6).state_dict()
    with pytest.raises(checkpoints.CheckpointError, match=r"layers\.0\.attn\.rpb expected \[3, 15"):
        checkpoints.load(tables(), state_dict)
