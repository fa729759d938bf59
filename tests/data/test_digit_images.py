import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from timm.data import create_loader

from vitarium.data.digits import DigitImages, digits_of, split


def test_the_last_360_are_held_out():
    data = sklearn.datasets.load_digits()
    training, held_out = split()
    for part, where in ((training, slice(0, 1437)), (held_out, slice(1437, 1797))):
        assert part.labels.tolist() == data.target[where].tolist()
        assert (part.pixels == data.data[where]).all()
        shades = np.stack([np.asarray(picture) for picture in part.pictures])
        assert shades.dtype == np.uint8
        expected = np.rint(data.images[where] / 16 * 255)
        assert (shades == expected[..., None]).all()


@pytest.mark.parametrize("name", ["train", "val"])
def test_images_are_the_digits_enlarged(name):
    target = sklearn.datasets.load_digits().target
    images = DigitImages(name)
    digits, samples = digits_of(name)
    assert images.samples == samples
    assert samples == {"train": range(1437), "val": range(1437, 1797)}[name]
    assert images.targets == target[samples.start : samples.stop].tolist()
    assert images.classes == tuple("0123456789")
    assert len(images) == len(samples)
    for index in (0, 17, len(images) - 1):
        picture, label = images[index]
        assert (picture.size, picture.mode) == ((64, 64), "RGB")
        assert label == target[samples[index]]
        expected = digits.pictures[index].resize((64, 64), Image.Resampling.BICUBIC)
        assert picture.tobytes() == expected.tobytes()
    picture.paste(
        (9, 9, 9), (0, 0, 64, 64)
    )  # what a caller does to a picture stays with the caller
    assert images[index][0].tobytes() == expected.tobytes()


def test_images_of_another_size_and_a_transform():
    images = DigitImages("val", size=28, transform=lambda picture: picture.size)
    assert images[3] == ((28, 28), images.targets[3])


def test_images_in_timms_loader():
    images = DigitImages("val")
    loader = create_loader(images, (3, 64, 64), 8, num_workers=0, use_prefetcher=False)
    x, y = next(iter(loader))
    assert (x.shape, x.dtype) == ((8, 3, 64, 64), torch.float32)
    assert y.tolist() == images.targets[:8]


def test_other_splits_and_sizes_are_refused():
    with pytest.raises(ValueError, match="^split: expected train or val, got 'test'$"):
        DigitImages("test")
    with pytest.raises(ValueError, match="^size: expected at least one pixel, got 0$"):
        DigitImages(size=0)
