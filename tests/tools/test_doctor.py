import torch

import vitarium
from vitarium.ops import _select
from vitarium.tools import doctor


def test_report(program, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("VITARIUM_OPS", raising=False)
    status, out, err = program("doctor")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"vitarium {vitarium.__version__} in ")
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    assert any(line.startswith("  cpu: ") for line in lines)
    cache = tmp_path / "checkpoints" / "vitarium"
    assert f"cached weights: {cache} (nothing yet)" in lines
    assert "VITARIUM_OPS: not set" in lines
    start = lines.index("neighborhood on cpu, with position bias (NAT): aten")
    assert lines[start + 1].startswith("  not reference: only on request")
    assert lines[start + 2] == "  not triton: its interpreter is for tests"
    assert lines[start + 3].startswith("  not natten: ")
    assert "neighborhood_scores on cpu, with position bias: aten" in lines
    assert "neighborhood_mix on cpu, any weights: aten" in lines
    cache.mkdir(parents=True)
    (cache / "x.pth").write_bytes(bytes(2**20))
    assert f"cached weights: {cache} (1 files, 1.0 MiB)" in program("doctor").out


def test_every_op_has_its_lines():
    assert doctor._CALLS.keys() == _select.ops.keys()


def test_a_requested_implementation_that_cannot_run_is_told(program, monkeypatch):
    monkeypatch.setenv("VITARIUM_OPS", "natten")
    status, out, err = program("doctor")
    assert (status, err) == (0, "")
    assert "VITARIUM_OPS: natten" in out.splitlines()
    assert "with position bias (NAT): impl='natten' cannot run this neighborhood call: " in out


def test_missing_packages_are_told(program, monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    assert "no-such-package not installed" in program("doctor").out.splitlines()
