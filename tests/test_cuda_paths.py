"""Which ops models run on a GPU, seen without one: fake tensors of a CUDA device have no values."""

import pytest
import torch
from attos import ATTOS, SIZE, create
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitarium.ops import _triton


class Ops(TorchDispatchMode):
    """Remembers our ops and the dtype of what they got."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitarium":
            self.found[func._opname] = args[0].dtype
        return func(*args, **(kwargs or {}))


def moved(model):
    """Parameters and buffers become fake ones on the device, inside a `FakeTensorMode`."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(p.shape, dtype=p.dtype, device="cuda")
                )
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
    return model


@pytest.fixture
def autocast(request):
    """Autocast of CUDA tensors to bfloat16, which its context manager refuses without a card."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", request.param)
    yield request.param
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", torch.float16)
    torch.clear_autocast_cache()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"], indirect=True)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", sorted({*ATTOS} - {"vitrpb_atto"}))  # whose attention is dense
def test_models_run_kernels_on_a_gpu(name, train, autocast, monkeypatch):
    monkeypatch.setattr(_triton, "device_unsupported", lambda device: None)
    model = create(name).train(train)
    with FakeTensorMode(), Ops() as ops, torch.set_grad_enabled(train):
        logits = moved(model)(torch.empty(2, 3, *SIZE, device="cuda"))
    assert logits.device.type == "cuda"
    assert ops.found
    for op, dtype in ops.found.items():
        assert op.endswith("_triton"), op
        assert dtype == (torch.bfloat16 if autocast else torch.float32), op
