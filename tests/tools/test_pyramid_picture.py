import numpy as np
import pytest
import torch
from PIL import Image

from vitarium.heads.features import FeatureBackbone
from vitarium.tools.features import comparison_picture, picture, pyramid, pyramid_picture


def _run(program, *argv):
    result = program("features", *argv)
    assert (result.status, result.err) == (0, "")
    return result.out.splitlines()


def test_own_size_with_a_checkpoint(program, photo, checkpoint, tmp_path):
    out = tmp_path / "new" / "folder"
    lines = _run(program, photo, "--model", "nat_atto", "--checkpoint", checkpoint, "--out", out)
    assert lines == [
        f"{photo}: 48 x 72 pixels (H x W)",
        f"nat_atto: weights of {checkpoint}",
        "  map 0: 32 channels, 12 x 18, stride 4",
        "  map 1: 64 channels, 6 x 9, stride 8",
        "  map 2: 128 channels, 3 x 5, stride 16",
        "  map 3: 256 channels, 2 x 3, stride 32",
        f"wrote {out / 'photo.nat_atto.features.png'}",
    ]
    with Image.open(out / "photo.nat_atto.features.png") as sheet:
        assert sheet.mode == "RGB"
        assert sheet.width > 3 * 480
        assert len(sheet.getcolors(sheet.width * sheet.height)) > 500


def test_another_size_with_random_weights(program, photo, tmp_path):
    lines = _run(
        program, photo, "--model", "nat_atto", "--random", "--size", "96", "--out", tmp_path
    )
    assert lines[:3] == [
        f"{photo}: 48 x 72 pixels (H x W), resized to 96 x 144",
        "nat_atto: random weights",
        "  map 0: 32 channels, 24 x 36, stride 4",
    ]


@pytest.mark.parametrize(
    ("model", "size", "last"),
    [
        ("resnet10t", "48 x 72 pixels (H x W)", "512 channels, 2 x 3, stride 32"),
        ("swin_s3_tiny_224", "resized to 64 x 64", "768 channels, 2 x 2, stride 32"),
    ],
)
def test_timm_models(model, size, last, program, photo, tmp_path):
    lines = _run(program, photo, "--model", model, "--random", "--out", tmp_path)
    assert lines[0].endswith(size)
    assert lines[-2].endswith(last)


def test_refusals(program, photo, checkpoint, tmp_path):
    def refused(*argv):
        status, out, err = program("features", *argv)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        return err.removeprefix("vitarium: error: ").removesuffix("\n")

    atto = ("--model", "nat_atto", "--random")
    unreadable = "cannot read this image"
    assert refused("no.png", *atto) == f"no.png: {unreadable}: No such file or directory"
    assert refused(tmp_path, *atto) == f"{tmp_path}: {unreadable}: Is a directory"
    assert refused(photo, "--model", "nat_atom").startswith("unknown model 'nat_atom'; did you")
    assert refused(photo, *atto, "--out", photo) == f"{photo}: File exists"
    assert refused(photo, *atto, "--size", "20", "--out", tmp_path).startswith(
        "image: expected [B, 3, H, W] with H, W >= 32, got shape (1, 3, 20, 30)"
    )
    assert " does not fit FeatureBackbone: nothing was loaded. " in refused(
        photo, "--model", "nat_mini", "--checkpoint", checkpoint, "--out", tmp_path
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return FeatureBackbone("nat_atto").eval()


def test_pyramid_normalizes_as_the_weights_want_it(backbone, photo):
    image = Image.open(photo)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        expected = backbone(pixels)
    for ours, theirs in zip(pyramid(image, backbone), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0])


def test_a_backbone_in_training_mode_is_refused(photo):
    with pytest.raises(ValueError, match="expected eval mode, got training mode"):
        pyramid_picture(Image.open(photo), FeatureBackbone("nat_atto"), "title")


def test_backbones_side_by_side(backbone, photo):
    image = Image.open(photo)
    torch.manual_seed(1)
    other = FeatureBackbone("dinat_atto", out_indices=(0, 1)).eval()
    both = np.asarray(comparison_picture(image, {"a": backbone, "b": other}, "title"))
    first, second = (
        np.asarray(comparison_picture(image, {name: x}, "title"))
        for name, x in (("a", backbone), ("b", other))
    )
    row = len(both) - len(first)  # what another row adds
    assert row > 213
    assert first.shape[1] == both.shape[1] > 5 * 320 > second.shape[1]
    assert (both[: len(first)] == first).all()
    below = both[len(first) :, : second.shape[1]]
    assert (below == second[-row:]).all()
    assert (both[len(first) :, second.shape[1] :] == 255).all()
    with pytest.raises(ValueError, match="backbones: expected at least one"):
        comparison_picture(image, {}, "title")


def test_colours_follow_the_principal_components():
    # Three independent patterns of falling strength, hidden in nine channels by a rotation.
    torch.manual_seed(0)
    patterns = torch.linalg.qr(torch.randn(16 * 16, 3))[0].T * torch.tensor([[9.0], [3.0], [1.0]])
    patterns = patterns - patterns.mean(1, keepdim=True)
    mixing = torch.linalg.qr(torch.randn(9, 3))[0]
    features = (mixing @ patterns).reshape(9, 16, 16)
    image = Image.new("RGB", (480, 480), "white")
    sheet = np.asarray(picture(image, [features], [1], "title")).astype(float)
    colours = sheet[40 + 15 : 40 + 480 : 30, 12 + 492 + 15 : 12 + 492 + 480 : 30].reshape(-1, 3)
    assert len(colours) == 256
    for component in range(3):
        correlation = np.corrcoef(colours[:, component], patterns[component])[0, 1]
        assert abs(correlation) > 0.95


def test_constant_and_tiny_maps_are_grey_where_nothing_varies():
    image = Image.new("RGB", (40, 30), "white")
    for features in (torch.ones(5, 4, 4), torch.ones(2, 1, 1)):
        sheet = np.asarray(picture(image, [features], [8], "title"))
        assert sheet[40 + 100, 12 + 492 + 100].tolist() == [128, 128, 128]


def test_the_picture_is_the_same_every_time(backbone, photo):
    image = Image.open(photo)
    first, second = (pyramid_picture(image, backbone, "title") for _ in range(2))
    assert first.tobytes() == second.tobytes()
