"""`vitarium doctor`: what is installed, and which implementation each op would run and why."""

from __future__ import annotations

import os
import platform
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import vitarium
from vitarium.ops import explain

_PACKAGES = (
    *("torch", "torchvision", "timm", "safetensors", "huggingface_hub", "numpy", "pillow"),
    *("triton", "natten", "mmdet", "mmcv", "mmcv-lite"),
)


def run(args: Namespace) -> int:
    """Print the report; a missing package or device is a finding, not an error."""
    print(f"vitarium {vitarium.__version__} in {Path(vitarium.__file__).parent}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        print(f"{package} {_version(package)}")
    devices = _devices()
    print("\ndevices")
    for device, description in devices.items():
        print(f"  {device}: {description}")
    print(f"\ncached weights: {_cache()}")
    print(f"VITARIUM_OPS: {os.environ.get('VITARIUM_OPS') or 'not set'}")
    print("\nops")
    for op, calls in _CALLS.items():
        for device in devices:
            for label, arguments in calls(torch.device(device)).items():
                print(f"{op} on {device}, {label}: {_choice(op, arguments)}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    devices = {
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    }
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{card.name}, compute capability {card.major}.{card.minor}, "
            f"{card.total_memory / 2**30:.0f} GiB"
        )
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _cache() -> str:
    folder = Path(torch.hub.get_dir()) / "checkpoints" / "vitarium"
    if not folder.is_dir():
        return f"{folder} (nothing yet)"
    sizes = [file.stat().st_size for file in folder.iterdir() if file.is_file()]
    return f"{folder} ({len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB)"


def _choice(op: str, arguments: dict[str, Any]) -> str:
    try:
        found = explain(op, **arguments)
    except ValueError as error:  # VITARIUM_OPS asks for what cannot run
        return str(error)
    others = [
        f"\n  not {name}: {found.why_not(name)}" for name in found.reasons if name != found.chosen
    ]
    return found.chosen + "".join(others)


def _neighborhood(device: torch.device) -> dict[str, dict[str, Any]]:
    heads, kernel = 2, 7
    query = torch.zeros(1, 2 * kernel, 2 * kernel, heads, 32, device=device)
    bias = torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1, device=device)
    plain = dict.fromkeys(("query", "key", "value"), query) | {"kernel_size": kernel}
    trained = plain | {"query": query.clone().requires_grad_()}
    return {
        "with position bias (NAT)": plain | {"bias": bias},
        "without bias": plain,
        "without bias, training": trained,
    }


def _neighborhood_scores(device: torch.device) -> dict[str, dict[str, Any]]:
    call = _neighborhood(device)["with position bias (NAT)"]
    return {"with position bias": {name: x for name, x in call.items() if name != "value"}}


def _neighborhood_mix(device: torch.device) -> dict[str, dict[str, Any]]:
    call = _neighborhood(device)["without bias"]
    value, kernel = call["value"], call["kernel_size"]
    weights = value.new_zeros(*value.shape[:4], kernel**2)
    return {"any weights": {"weights": weights, "value": value, "kernel_size": kernel}}


def _channel(device: torch.device) -> dict[str, dict[str, Any]]:
    query = torch.zeros(1, 7, 7, 3, 32, device=device)
    call = dict.fromkeys(("query", "key", "value"), query)
    return {"DaViT": call, "Florence-2": call | {"mode": "florence"}}


def _agent(device: torch.device) -> dict[str, dict[str, Any]]:
    heads, agents = 3, 9
    query = torch.zeros(1, 14, 14, heads, 32, device=device)
    call = dict.fromkeys(("query", "key", "value"), query) | {"agent_size": 3}
    biases = {
        "agent_bias": query.new_zeros(heads, agents, 196),
        "token_bias": query.new_zeros(heads, 196, agents),
    }
    classes = {"prefix": (query.new_zeros(1, 1, heads, 32),) * 3}
    return {"with biases": call | biases, "with a class token": call | classes}


def _routing(device: torch.device) -> dict[str, dict[str, Any]]:
    query = torch.zeros(1, 14, 14, 2, 32, device=device)
    call = dict.fromkeys(("query", "key", "value"), query) | {"num_regions": 7, "topk": 4}
    return {"7 x 7 regions (BiFormer)": call}


def _window(device: torch.device) -> dict[str, dict[str, Any]]:
    heads, window = 2, 7
    query = torch.zeros(1, 2 * window, 2 * window, heads, 32, device=device)
    plain = dict.fromkeys(("query", "key", "value"), query) | {"window_size": window}
    bias = torch.zeros(heads, 2 * window - 1, 2 * window - 1, device=device)
    shifted = plain | {"shift_size": window // 2, "bias": bias}
    return {
        "shifted, with position bias (Swin)": shifted,
        "cosine form (SwinV2)": shifted | {"logit_scale": torch.zeros(heads, device=device)},
        "without bias (DaViT)": plain,
    }


_CALLS: dict[str, Callable[[torch.device], dict[str, dict[str, Any]]]] = {
    "neighborhood": _neighborhood,
    "neighborhood_scores": _neighborhood_scores,
    "neighborhood_mix": _neighborhood_mix,
    "channel": _channel,
    "agent": _agent,
    "routing": _routing,
    "window": _window,
}
