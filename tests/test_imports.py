"""What an import does and what it does not need, each in a fresh process."""

import subprocess
import sys
import textwrap

HEAVY = ("vitarium.heads", "vitarium.tools", "natten", "sklearn", "matplotlib", "rich")
PREAMBLE = """
import socket, sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    NAMES = {"triton", "mmdet", "mmcv", "mmengine", "natten", "sklearn", "matplotlib", "onnx"}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in cls.NAMES:
            return PathFinder.find_spec(name, path, target)

def refuse(*args, **kwargs):
    raise AssertionError("the network was touched")

sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def run(code):
    script = PREAMBLE + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_models_run_without_optional_packages_and_network():
    out = run("""
        import timm, torch, vitarium
        from vitarium.backbones._registry import entries
        for name in entries():
            if name.endswith("_atto"):
                model = timm.create_model(name)
                model(torch.randn(1, 3, 64, 64)).sum().backward()
                print(name)
        print(vitarium.ops.explain(
            "neighborhood", *torch.randn(3, 1, 7, 7, 1, 8), kernel_size=7).chosen)
    """)
    *names, chosen = out.split()
    assert "nat_atto" in names
    assert chosen == "aten"


def test_importing_registers_every_backbone_quietly_and_loads_no_more_than_it_needs():
    names, modules = run("""
        import warnings
        import timm
        before = set(timm.list_models())
        warnings.simplefilter("error")
        import vitarium
        from vitarium.backbones._registry import entries
        assert before.isdisjoint(entries()), "timm has these names too"
        assert set(timm.list_models()) == before | set(entries())
        print(*entries())
        print(*sys.modules)
    """).splitlines()
    assert {"nat_atto", "nat_mini", "nat_tiny", "nat_small", "nat_base"} <= {*names.split()}
    assert "vitarium.backbones" in modules.split()
    assert not [name for name in modules.split() if name.startswith(HEAVY)]
