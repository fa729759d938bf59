import sys

import numpy as np
import pytest
import timm
import torch
from matplotlib import colormaps
from PIL import Image

from vitarium.heads.features import FeatureBackbone
from vitarium.tools.visualize import Attention, attention_of, neighborhood_picture, picture


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def dinat():
    """A dinat_atto in float64 whose attention is far from even."""
    torch.manual_seed(0)
    model = timm.create_model("dinat_atto").double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


BLOCKS = [f"levels.{i}.blocks.{j}" for i, j in ((0, 0), (1, 0), (2, 2), (3, 0), (0, 1), (1, 1))]


# Of the second image the maps are 12 x 18, 6 x 9, 3 x 5 and 2 x 3; a window that is dilated needs
# 15 x 15 tokens of the first one, and any window 3 x 3 of the last.
@pytest.mark.parametrize(
    ("size", "pixel", "padding"),
    [
        ((96, 72), (0, 0), [0, 0, 0, 0, 0, 0]),
        ((96, 72), (50, 30), [0, 0, 0, 0, 0, 0]),
        ((95, 70), (94, 69), [0, 0, 0, 0, 0, 0]),
        ((72, 48), (0, 0), [0, 0, 0, 3, 5, 0]),
        ((72, 48), (71, 20), [0, 0, 0, 3, 5, 0]),
    ],
)
@torch.no_grad()
def test_values_so_weighted_are_what_the_block_computes(dinat, size, pixel, padding):
    blocks = [dinat.get_submodule(name).attn for name in BLOCKS]
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, _, output: seen.__setitem__(m, output))
        for attn in blocks
        for module in (attn, attn.qkv)
    ]
    found = attention_of(dinat, noise(*size), pixel)
    for hook in hooks:
        hook.remove()
    assert [attention.name for attention in found] == BLOCKS
    assert [attention.padding for attention in found] == padding
    for attention, attn in zip(found, blocks, strict=True):
        weights, (height, width) = attention.weights, attention.map_size
        assert weights.max() > 2 * weights.mean()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))
        tokens = [
            seen[attn.qkv][0, y, x] if x < width and y < height else attn.qkv.bias
            for x, y in (attention.cells // attention.stride).tolist()
        ]
        values = torch.stack(tokens).unflatten(-1, (3, attn.num_heads, attn.head_dim))[:, 2]
        mixed = torch.einsum("hn,nhc->hc", weights, values).flatten()
        column, row = (n // attention.stride for n in attention.query)
        torch.testing.assert_close(attn.proj(mixed), seen[attn][0, row, column])


def corners(attention):
    """Distinct x and y of the cells, which must be all pairs of them, row by row."""
    rows, columns = attention.cells[:, 1].unique().tolist(), attention.cells[:, 0].unique().tolist()
    assert attention.cells.tolist() == [[x, y] for y in rows for x in columns]
    return columns, rows


def test_an_interior_pixel_is_in_the_middle_of_its_window(dinat):
    plain, *_, dilated, _ = attention_of(dinat, noise(96, 72), (50, 38))
    assert plain.query == dilated.query == (48, 36)
    assert corners(plain) == ([40, 44, 48, 52, 56], [28, 32, 36, 40, 44])
    assert corners(dilated) == ([24, 36, 48, 60, 72], [12, 24, 36, 48, 60])
    assert (plain.span, dilated.span) == (20, 52)


def test_at_a_corner_windows_shift_inside(dinat):
    plain, *_, dilated, _ = attention_of(dinat, noise(96, 72), (95, 1))
    assert plain.query == dilated.query == (92, 0)
    assert corners(plain) == ([76, 80, 84, 88, 92], [0, 4, 8, 12, 16])
    assert corners(dilated) == ([44, 56, 68, 80, 92], [0, 12, 24, 36, 48])


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("nat_atto", ["levels.0.blocks.1", "levels.1.blocks.1", *BLOCKS[2:4]]),
        (
            "dinat_s_atto",
            [f"layers.{i}.blocks.{j}" for i, j in ((0, 0), (1, 0), (2, 1), (3, 0), (0, 1), (1, 1))],
        ),
        ("dinat_isotropic_atto", ["layers.0", "layers.2", "layers.1", "layers.3"]),
    ],
)
def test_the_blocks_that_are_drawn(name, blocks):
    for model in (timm.create_model(name), FeatureBackbone(name)):
        found = attention_of(model.eval(), noise(64, 64), (0, 0))
        assert [attention.name for attention in found] == blocks


def test_it_leaves_no_hooks(dinat):
    attention_of(dinat, noise(64, 64), (0, 0))
    with pytest.raises(ValueError, match=r"image: expected"):
        attention_of(dinat, noise(8, 8), (0, 0))
    assert not any(module._forward_hooks for module in dinat.modules())


def test_refusals(dinat):
    image = noise(64, 48)
    for pixel in ((64, 0), (0, 48), (-1, 0)):
        x, y = pixel
        with pytest.raises(ValueError, match=f"pixel: expected x, y below 64, 48, got {x}, {y}"):
            attention_of(dinat, image, pixel)
    for name in ("vitrpb_atto", "resnet10t"):
        model = timm.create_model(name).eval()
        with pytest.raises(ValueError, match=f"neighborhood attention .*, {name} has none"):
            neighborhood_picture(image, model, (0, 0), "title")
    with pytest.raises(ValueError, match="Identity has none"):
        attention_of(torch.nn.Identity(), image, (0, 0))
    with pytest.raises(ValueError, match="expected eval mode, got training mode"):
        attention_of(timm.create_model("nat_atto"), image, (0, 0))


def attention(stride, dilation=1, corner=(0, 0)):
    """Nine neighbors whose weights, averaged over two heads, are 0/36, 1/36 ... 8/36."""
    cells = [
        (corner[0] + x * dilation * stride, corner[1] + y * dilation * stride)
        for y in range(3)
        for x in range(3)
    ]
    weights = torch.arange(9) / 36 + torch.tensor([[0.01], [-0.01]])
    return Attention("name", 3, dilation, stride, (8, 8), cells[4], torch.tensor(cells), weights)


def viridis(index):
    """The colour of a neighbor over a black photograph."""
    return 0.85 * np.array(colormaps["viridis"](index / 8, bytes=True)[:3])


def colour(sheet, x, y):
    return np.asarray(sheet)[12 + 28 + round(y), 12 + round(x)].astype(float)


@pytest.mark.parametrize("dilation", [1, 2])
def test_cells_have_the_colours_of_their_weights(dilation):
    drawn = attention(8, dilation, corner=(16, 8))
    sheet = picture(Image.new("RGB", (64, 64)), [drawn], (0, 63), "title")
    scale = 400 / 64
    for index, (x, y) in enumerate(drawn.cells.tolist()):
        expected = viridis(index)
        assert abs(colour(sheet, (x + 4) * scale, (y + 4) * scale) - expected).max() < 3
    empty = [(8, 8), (60, 60)] + ([(28, 12), (20, 20)] if dilation == 2 else [])
    for x, y in empty:
        assert colour(sheet, x * scale, y * scale).max() == 0
    x, y = drawn.query
    assert colour(sheet, x * scale + 1, (y + 4) * scale).min() > 160  # the frame
    red, green, _ = colour(sheet, 0.5 * scale + 4, 63.5 * scale)  # the cross
    assert red > 200 > 2 * green


def test_cells_beyond_the_photograph_are_cut_off():
    drawn = attention(8, corner=(56, 56))
    assert drawn.padding == 8
    sheet = np.asarray(picture(Image.new("RGB", (64, 64)), [drawn], (60, 60), "title"))
    assert (sheet[40:440, 12 + 400 :] == 255).all()


def test_a_small_window_is_shown_enlarged_in_the_farthest_corner():
    scale = 400 / 64
    for corner, left, top in (((4, 4), 268, 268), ((48, 8), 0, 268), ((44, 40), 0, 0)):
        drawn = attention(4, corner=corner)
        pixel = (corner[0] + 6, corner[1] + 6)
        sheet = picture(Image.new("RGB", (64, 64)), [drawn], pixel, "title")
        for index in (0, 2, 6, 8):
            x, y = (1 + (n + 0.5) * 130 / 3 for n in (index % 3, index // 3))
            assert abs(colour(sheet, left + x, top + y) - viridis(index)).max() < 3
            x, y = drawn.cells[index].tolist()
            assert abs(colour(sheet, (x + 2) * scale, (y + 2) * scale) - viridis(index)).max() < 3


@pytest.mark.parametrize("size", [(16, 64), (64, 16)])
def test_a_narrow_photograph_has_its_legend_and_no_room_to_enlarge(size):
    drawn = attention(4)
    sheet = np.asarray(picture(Image.new("RGB", size), [drawn], (6, 6), "title"))
    bottom = 40 + round(size[1] * 400 / 64)
    bar = sheet[bottom + 10, 12 : 12 + 310].astype(int)
    assert np.abs(bar - colormaps["viridis"](1.0, bytes=True)[:3]).max(-1).min() == 0
    assert (sheet[bottom + 4 : bottom + 26, 12 + 300 : 12 + 310] == 255).all()
    end = sheet[bottom - 20, 12 + round(size[0] * 400 / 64) - 20]
    assert end.max() == 0


def test_plain_blocks_are_above_dilated_ones():
    image = Image.new("RGB", (64, 64))
    found = [attention(8), attention(8), attention(8, dilation=2)]
    for count, width, height in ((2, 2, 1), (3, 2, 2)):
        sheet = picture(image, found[:count], (0, 0), "t")
        assert sheet.size == (12 + width * 412, 40 + height * 479)


def test_the_photograph_is_dimmed_and_grey(dinat):
    image = Image.new("RGB", (96, 72), (250, 20, 20))
    sheet = neighborhood_picture(image, dinat, (90, 60), "title")
    assert np.ptp(colour(sheet, 20, 20)) == 0
    assert 0 < colour(sheet, 20, 20)[0] < 70


def test_the_command(program, photo, checkpoint, tmp_path):
    out = tmp_path / "new" / "folder"
    argv = (photo, "--model", "nat_atto", "--checkpoint", checkpoint, "--out", out)
    status, text, err = program("visualize", *argv)
    assert (status, err) == (0, "")
    file = out / "photo.nat_atto.neighborhoods.png"
    assert text.splitlines() == [
        f"{photo}: 48 x 72 pixels (H x W)",
        f"nat_atto: weights of {checkpoint}; x = 36, y = 24",
        "  levels.0.blocks.1: 7 x 7 neighbors, dilation 1, map 12 x 18, stride 4, spans 28 x 28"
        " pixels",
        "  levels.1.blocks.1: 5 x 5 neighbors, dilation 1, map 6 x 9, stride 8, spans 40 x 40"
        " pixels",
        "  levels.2.blocks.2: 3 x 3 neighbors, dilation 1, map 3 x 5, stride 16, spans 48 x 48"
        " pixels",
        "  levels.3.blocks.0: 3 x 3 neighbors, dilation 1, map 2 x 3, stride 32, spans 96 x 96"
        " pixels, 3 of 9 neighbors are padding",
        f"wrote {file}",
    ]
    with Image.open(file) as sheet:
        assert sheet.mode == "RGB"
        assert sheet.width > 4 * 400


@pytest.mark.parametrize(
    ("pixel", "found"),
    [
        ("0,0", "x = 1, y = 1"),
        ("71,47", "x = 143, y = 95"),
        ("0.25,0.5", "x = 36, y = 48"),
        ("1.0,1.0", "x = 143, y = 95"),
    ],
)
def test_a_pixel_moves_with_the_size(pixel, found, program, photo, tmp_path):
    argv = (photo, "--model", "nat_atto", "--random", "--size", "96", "--out", tmp_path)
    lines = program("visualize", *argv, "--pixel", pixel).out.splitlines()
    assert lines[:2] == [
        f"{photo}: 48 x 72 pixels (H x W), resized to 96 x 144",
        f"nat_atto: random weights; {found}",
    ]


def test_the_command_refuses(program, photo, tmp_path, monkeypatch):
    def refused(*argv, model="nat_atto"):
        status, out, err = program("visualize", photo, "--model", model, *argv, "--out", tmp_path)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        return err.removeprefix("vitarium: error: ").removesuffix("\n")

    none = "model: expected one with neighborhood attention (NAT, DiNAT), {} has none"
    assert refused("--random", "--pixel", "72,0") == "pixel: expected x, y below 72, 48, got 72, 0"
    assert refused("--random", "--pixel", "0.5,1.5").startswith("pixel: expected fractions from 0")
    assert refused("--random", "--pixel", "nan,0.5").startswith("pixel: expected fractions from 0")
    assert refused("--size", "20").startswith("image: expected [B, 3, H, W] with H, W >= 32")
    for model in ("vitrpb_atto", "resnet10t"):
        assert refused("--random", "--size", "64", model=model) == none.format(model)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused("--random").startswith("matplotlib is not installed: pip install")
    assert sorted(file.name for file in tmp_path.iterdir()) == []
