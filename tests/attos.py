"""The smallest model of each family, and how tests build and feed it."""

import math

import timm
import torch

from vitarium.backbones._registry import entries

ATTOS = [name for name in entries() if name.endswith("_atto")]
SIZE = (48, 80)


def is_fixed(name):
    """Whether a model takes images of one size only, which is chosen when it is built."""
    return timm.get_pretrained_cfg(name).fixed_input_size


def smallest_side(name):
    return timm.get_pretrained_cfg(name).min_input_size[-1]


def limits(name):
    """What a model cannot do, as its family states it."""
    return getattr(entries()[name], "_LIMITS", {}).get(name, ())


def sizes(name):
    """Non-square, native, smallest; and, where any size will do, odd."""
    native, smallest = timm.get_pretrained_cfg(name).input_size[1:], smallest_side(name)
    found = [SIZE, native, (smallest, smallest)]
    return found if is_fixed(name) else [*found, (37, 51)]


def create(name, size=SIZE, seed=0, **kwargs):
    """A model for images of that size; the same seed gives the same weights."""
    torch.manual_seed(seed)
    if is_fixed(name):
        kwargs["img_size"] = size
    return timm.create_model(name, **kwargs).eval()


def image(size=SIZE, batch=1, channels=3):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def map_sizes(model, size):
    return [tuple(math.ceil(n / i["reduction"]) for n in size) for i in model.feature_info]


def as_map(model, x, size):
    """[B, H, W, C] from a map in the model's own layout, or from tokens [B, P + H * W, C]."""
    if x.ndim == 4:
        return x.permute(0, 2, 3, 1) if model.output_fmt == "NCHW" else x
    return x[:, model.num_prefix_tokens :].unflatten(1, map_sizes(model, size)[-1])


def assert_same(actual, expected, tolerance=1e-5):
    """Equal up to rounding, relative to the spread: float32 sums differ in their order only."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.std()
    assert error <= tolerance, f"{error:.1e} of the spread"


def gradients(model, x, run=None):
    """Logits, and the gradient of every parameter of ``model`` when ``run`` computes them."""
    model.zero_grad()
    out = (model if run is None else run)(x)
    out.square().sum().backward()
    return {"logits": out.detach()} | {k: p.grad.clone() for k, p in model.named_parameters()}
