"""What ops demand of their arguments; every failure is a ValueError that names the argument."""

from __future__ import annotations

from torch import Tensor

Pair = tuple[int, int]


def floating(name: str, x: object) -> None:
    """Demand a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def maps(**tensors: Tensor) -> None:
    """Demand maps ``[B, H, W, heads, head_dim]`` like the first one, without an empty axis."""
    first, standard = next(iter(tensors.items()))
    for name, x in tensors.items():
        floating(name, x)
        if x.ndim != 5:
            raise ValueError(
                f"{name}: expected rank 5, [B, H, W, heads, head_dim], got shape {tuple(x.shape)}"
            )
        if x.shape != standard.shape:
            raise ValueError(
                f"{name}: expected {first}'s shape {tuple(standard.shape)}, got {tuple(x.shape)}"
            )
        same_kind(name, x, first, standard)
    for name, size in zip(("H", "W", "heads", "head_dim"), standard.shape[1:], strict=True):
        if size < 1:
            raise ValueError(f"{first}: expected {name} >= 1, got shape {tuple(standard.shape)}")


def same_kind(name: str, x: Tensor, other: str, standard: Tensor) -> None:
    """Demand the dtype and the device of another argument."""
    if x.dtype != standard.dtype or x.device != standard.device:
        raise ValueError(
            f"{name}: expected {other}'s dtype and device ({standard.dtype}, {standard.device}), "
            f"got {x.dtype}, {x.device}"
        )


def parameter(name: str, x: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Demand an optional tensor of ``shape`` on ``like``'s device; returned in its dtype."""
    if x is None:
        return None
    floating(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {x.device}")
    return x.to(like.dtype)


def pair(name: str, value: object) -> Pair:
    """Demand a positive int or two; returned as two."""
    found = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(found, (tuple, list))
        or len(found) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in found)
    ):
        raise ValueError(f"{name}: expected a positive int or a pair of them, got {value!r}")
    return found[0], found[1]


def window(kernel_size: int | Pair, dilation: int | Pair) -> tuple[Pair, Pair]:
    """Demand odd kernel sizes, and dilations; returned as pairs."""
    kernel = pair("kernel_size", kernel_size)
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(f"kernel_size: expected odd sizes, got {kernel_size!r}")
    return kernel, pair("dilation", dilation)


def fits(x: Tensor, kernel: Pair, dilation: Pair, otherwise: str = "") -> None:
    """Demand a map that holds the dilated window."""
    for axis, size, k, d in zip("HW", x.shape[1:3], kernel, dilation, strict=True):
        if k * d > size:
            raise ValueError(
                f"kernel_size: expected kernel_size * dilation <= {axis} = {size}, got "
                f"{k} * {d}{otherwise}"
            )
