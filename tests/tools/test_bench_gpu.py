"""The GPU benchmark's path, run on a CPU: rows, verdicts, reasons; what needs a card is `gpu`."""

import csv
import io
import weakref
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from vitarium.tools import bench, bench_case, bench_gpu, bench_gpu_report
from vitarium.tools.bench_channel import Channel
from vitarium.tools.bench_gpu import Ceilings, Run

TINY = Channel(5, 9, 2, batch=2, head_dim=8, dtype=torch.bfloat16)
CEILINGS = Ceilings(copy=2.0, product=0.5)
RUN = Run(bench.CPU, CEILINGS, 3, lambda function: function)


@pytest.fixture
def native(monkeypatch):
    """One tiny case as the only shape of every model."""
    monkeypatch.setattr(bench_gpu, "_NATIVE", {"channel": lambda size: [TINY, TINY]})
    monkeypatch.setattr(bench_gpu, "_compiled", lambda function: function)


@pytest.mark.parametrize("backward", [False, True])
def test_rows(backward):
    rows = bench_gpu.measured(RUN, TINY, False, backward)
    names = [row["implementation"] for row in rows]
    assert names[:3] == ["triton", "aten", "aten, compiled"]
    assert {"timm", "timm, compiled", "SDPA over channels"} <= {*names}
    assert [row["implementation"] for row in rows if row["auto"]] == ["aten"]
    auto = rows[1]
    for row in rows:
        assert (row["ms"] is None) == (row["timed"] is None)
        if row["ms"] is None:
            assert row["note"]
            continue
        assert row["timed"] == "eager"
        assert row["max_error"] < 0.2
        assert row["first_s"] >= 0
        assert row["peak_mib"] >= 0
        seconds = row["ms"] / 1e3
        assert row["gb_s"] == pytest.approx(row["bytes"] / seconds / 1e9, abs=0.051)
        assert row["copy_percent"] == pytest.approx(50 * row["gb_s"], abs=0.051)
        assert row["product_percent"] == pytest.approx(200 * row["tflop_s"], abs=0.051)
        assert row["over_auto"] == pytest.approx(row["ms"] / auto["ms"], abs=0.001)
    assert auto["max_error"] > 0
    assert auto["pass"] == ("forward+backward" if backward else "forward")


def test_errors_are_those_of_the_candidate(monkeypatch):
    """A wrong gradient is found where the output is right."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad + 3

    def peers(self, biased, backward, compiled):
        return {"wrong": lambda inputs: Wrong.apply(self.ours(inputs))}

    monkeypatch.setattr(Channel, "peers", peers)
    errors = [bench_gpu.measured(RUN, TINY, False, x)[-1]["max_error"] for x in (False, True)]
    assert errors[0] < 0.1
    assert errors[1] > 1


def test_who_fails_says_why(monkeypatch):
    calls = []

    def fails_later(inputs):
        calls.append(inputs)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no room\nand more")
        return TINY.ours(inputs)

    def breaks(inputs):
        raise TypeError

    peers = {"large": fails_later, "broken": breaks, "absent": "not installed"}
    monkeypatch.setattr(Channel, "peers", lambda *_: peers)
    rows = bench_gpu.measured(RUN, TINY, False, False)[-3:]
    assert [row["note"] for row in rows] == [
        "failed: OutOfMemoryError: no room",
        "failed: TypeError: no message",
        "not installed",
    ]
    assert [row["ms"] for row in rows] == [None] * 3
    out = io.StringIO()
    rows[0]["auto"] = True
    bench_gpu_report.show(Console(file=out, width=200), rows)
    assert out.getvalue().count("not run: ") == 3


def test_a_slow_one_has_one_call(monkeypatch):
    monkeypatch.setattr(bench_gpu, "_SLOW", 0.0)
    row = bench_gpu.measured(RUN, TINY, False, False)[1]
    assert row["timed"] == "one call"
    assert row["ms"] > 0


def test_no_reference_is_said(monkeypatch):
    def oracle(self, inputs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Channel, "oracle", oracle)
    row = bench_gpu.measured(RUN, TINY, False, False)[1]
    assert row["note"] == "no reference: OutOfMemoryError: no room"
    assert row["ms"] > 0
    assert row["max_error"] is None


def test_inputs_exceed_the_cache_twice():
    cost = bench_case.cost(TINY, False, True)
    one = 4 * 2 * 45 * 16 * 2  # query, key, value and the output's gradient
    sets = bench_gpu._sets(TINY, False, True, cost, cache=4 * one)
    assert len(sets) == 8
    assert len({x["qkv"].data_ptr() for x, _ in sets}) == 8
    assert len(bench_gpu._sets(TINY, False, True, cost, cache=one // 4)) == 2


def test_candidates_take_turns():
    order = []

    def candidate(name, seconds):
        return bench_gpu.Timed(lambda: order.append(name) or seconds, "")

    times = iter([5.0, 1.0, 3.0])
    ready = {"a": bench_gpu.Timed(lambda: order.append("a") or next(times), "")}
    ready["b"] = candidate("b", 2.0)
    assert bench_gpu.medians(ready, 3) == {"a": 3.0, "b": 2.0}
    assert order == ["a", "b"] * 3


def test_ceilings():
    found = bench_gpu.ceilings(bench.CPU, copied=1 << 20, side=64)
    assert 0.1 < found.copy < 1e4
    assert 0 < found.product < 100
    assert str(Ceilings(4312.4, 790.04)) == "copy 4,312 GB/s, bfloat16 product 790.0 TFLOP/s"


def row(name, ms, percent, passed="forward", **other):
    found = {"op": "window", "case": "c", "batch": 8, "dtype": "bfloat16", "pass": passed}
    found |= {"implementation": name, "ms": ms, "copy_percent": percent, "note": "", "auto": False}
    return {**found, "product_percent": 10, **other}


OURS = {"auto": True}
BACK = "forward+backward, bias"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("triton", 1, 60, **OURS), row("aten", 2, 30), row("timm", 1.6, 35)], "met met"),
        ([row("triton", 1, 60, **OURS), row("aten", 2, 30), row("timm", 1.4, 45)], "met MISSED"),
        ([row("triton", 1, 80, **OURS), row("timm", 1.1, 73)], "met met"),
        ([row("triton", 1, 49, **OURS), row("timm", 1.6, 30)], "MISSED met"),
        ([row("triton", 1, 60, **OURS), row("timm", None, None)], "met "),
        # what computes for longer than it moves is held to the product
        ([row("triton", 1, 20, product_percent=55, **OURS), row("timm", 2, 10)], "met met"),
        # our other kernels are no peers of what `auto` picks, nor is another form of that
        (
            [
                row("triton", 0.5, 99),
                row("aten", 1, 60, **OURS),
                row("aten, compiled", 1, 60),
                row("SDPA", 1.5, 40),
            ],
            "met met",
        ),
        ([row("triton", 1, 0, BACK, **OURS), row("aten, compiled", 1.3, 0, BACK)], "met"),
        ([row("triton", 1, 0, BACK, **OURS), row("aten", 1.29, 0, BACK)], "MISSED"),
        ([row("triton", None, None, **OURS), row("aten", 1, 9)], "MISSED"),
    ],
)
def test_verdicts(rows, expected):
    found = bench_gpu_report.verdicts(rows)
    assert " ".join(line[-1] for line in found) == expected
    out = io.StringIO()
    bench_gpu_report.judge(Console(file=out, width=200), found)
    met = expected.split().count("met")
    assert f"{met} of {len(expected.split())} met" in out.getvalue()


def test_a_run(native):
    out, saved = io.StringIO(), []
    args = Namespace(names=["channel"], sizes=["224"], dtype=["float32"], quick=True, rounds=1)
    console = Console(file=out, width=200)
    rows = bench_gpu.measure(console, args, bench.CPU, CEILINGS, lambda x: saved.append(len(x)))
    assert len(rows) == 16
    assert saved == [8, 16]
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    assert {row["dtype"] for row in rows} == {"float32"}
    printed = out.getvalue()
    assert "channel 5x9 x 2 heads, batch 2, float32, forward; at least 0.0 MB" in printed
    assert "aten (auto)" in printed
    assert "Goals, of what `auto` runs: " in printed
    args.names = ["window"]
    with pytest.raises(ValueError, match="expected ops of models among channel, got 'window'"):
        bench_gpu.measure(console, args, bench.CPU, CEILINGS, saved.append)


def test_the_head_says_where_and_how(monkeypatch):
    head = bench_gpu_report.head(bench.CPU, ["bench", "ops", "a b"])
    assert head.splitlines()[1] == "vitarium bench ops 'a b'"
    for package in ("triton", "natten"):
        assert f"{package} " in head
    monkeypatch.setattr(bench_gpu_report, "version", lambda name: "1.5")
    assert "natten 1.5" in bench_gpu_report.head(bench.CPU, [])


def test_what_nvidia_smi_tells(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\necho "$@" > "$0.args"\necho "580.1, 1980 MHz, 3201 MHz, 700 W"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = bench_gpu_report._driver(Namespace(uuid="ab-c"))
    assert found == "driver 580.1, SM up to 1980 MHz, memory up to 3201 MHz, power up to 700 W"
    assert (tmp_path / "nvidia-smi.args").read_text().endswith("--id=GPU-ab-c\n")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert bench_gpu_report._driver(Namespace()) == "driver unknown (no nvidia-smi)"


def test_csv(tmp_path):
    rows = bench_gpu.measured(RUN, TINY, False, False)
    bench.write_csv(tmp_path / "x.csv", rows, "one\ntwo")
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert lines[:2] == ["# one", "# two"]
    assert lines[2] == (
        "op,case,batch,dtype,pass,implementation,auto,ms,over_auto,gb_s,tflop_s,copy_percent,"
        "product_percent,peak_mib,max_error,first_s,timed,note,bytes,flops,copy_gb_s,"
        "product_tflop_s,device"
    )
    assert len(lines) == 3 + len(rows)


def test_the_command(program, native, monkeypatch, tmp_path):
    """Everything but the card: where `cuda` is asked for, a CPU computes."""
    device = Namespace(type="cuda")
    monkeypatch.setattr(bench, "pick_device", lambda name: device)
    monkeypatch.setattr(bench, "machine", lambda threads, found, fresh: f"machine of {found.type}")
    monkeypatch.setattr(bench_gpu_report, "_card", lambda found: f"card of {found.type}")
    monkeypatch.setattr(bench_gpu, "ceilings", lambda found: CEILINGS)
    measure = bench_gpu.measure

    def on_cpu(console, args, found, *rest):
        assert found is device
        return measure(console, args, bench.CPU, *rest)

    monkeypatch.setattr(bench_gpu, "measure", on_cpu)
    file = tmp_path / "ops.csv"
    argv = ("--device", "cuda", "--quick", "--sizes", "224", "--csv", file, "--plot", tmp_path)
    status, out, _ = program("bench", "ops", *argv)
    assert status == 0
    lines = file.read_text().splitlines()
    assert lines[0] == "# machine of cuda"
    assert lines[1].startswith("# card of cuda, triton ")
    assert lines[3] == "# copy 2 GB/s, bfloat16 product 0.5 TFLOP/s"
    rows = list(csv.DictReader(lines[4:]))
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    pictures = [f"ops_channel_{x}_bfloat16.png" for x in ("forward+backward", "forward")]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["ops.csv", *pictures]
    assert "card of cuda" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--dtype", "float16"), "--dtype: expected it with --device cuda only"),
        (("--sizes", "224"), "--sizes: expected it with --device cuda only"),
    ],
)
def test_refusals(program, argv, message):
    status, _, err = program("bench", "ops", *argv)
    assert status == 1
    assert err == f"vitarium: error: {message}\n"


class Card:
    """Stands for CUDA: its clock goes on by ``launch`` per call, or per ``kernel`` of a graph."""

    def __init__(self, monkeypatch, kernel, launch, refuses=""):
        self.now, self.step, self.mode, self.refuses = 0.0, launch, 0, refuses
        card = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = card.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        class Graph:
            def replay(self):
                card.now += self.seconds

        @contextmanager
        def graph(found):
            if card.refuses == "capture":
                raise RuntimeError("cannot be captured")
            assert card.mode == 0
            start, card.step = card.now, kernel
            yield
            found.seconds, card.now, card.step = card.now - start, start, launch

        stream = Namespace(wait_stream=lambda other: None)
        fakes = {"Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": lambda: stream}
        fakes |= {"current_stream": lambda: stream, "stream": lambda _: nullcontext()}
        fakes |= {"synchronize": lambda: None, "set_stream": lambda _: None}
        fakes |= {"get_sync_debug_mode": lambda: self.mode, "set_sync_debug_mode": self.set_mode}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def set_mode(self, mode):
        self.mode = mode

    def call(self):
        if self.mode == "error" and self.refuses == "waiting":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.now += self.step
        return object()


def test_graphs_leave_out_gaps_between_launches(monkeypatch):
    card = Card(monkeypatch, kernel=4e-6, launch=50e-6)
    found = bench_gpu.on_gpu([card.call] * 5)
    assert found.how == "graph"
    begun = card.now
    assert found.turn() == pytest.approx(4e-6)
    assert card.now - begun > bench_gpu._TURN
    assert card.mode == 0


@pytest.mark.parametrize("refuses", ["waiting", "capture"])
def test_without_a_graph_launches_count(monkeypatch, refuses):
    card = Card(monkeypatch, kernel=4e-6, launch=50e-6, refuses=refuses)
    found = bench_gpu.on_gpu([card.call] * 5)
    reason = {"waiting": "called a synchronizing CUDA operation", "capture": "cannot be captured"}
    assert (found.how, found.why) == ("eager", f"no graph: RuntimeError: {reason[refuses]}")
    assert found.turn() == pytest.approx(50e-6)
    assert card.mode == 0


def test_every_call_keeps_its_own_result(monkeypatch):
    """Else a call would write to the memory of the one before, which the cache still holds."""
    alive = weakref.WeakSet()
    card = Card(monkeypatch, kernel=2e-3, launch=2e-3, refuses="capture")

    class Result:
        pass

    def call():
        card.call()
        found = Result()
        alive.add(found)
        return found

    timed = bench_gpu.on_gpu([call] * 5)
    assert len(alive) == 5
    assert timed.turn() == pytest.approx(2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnACard:
    device = torch.device("cuda:0") if torch.cuda.is_available() else None

    def test_rows(self):
        run = replace(RUN, device=self.device, compiled=bench_gpu._compiled)
        case = bench_case.placed(Channel(28, 28, 6, batch=8), self.device, torch.bfloat16)
        for backward in (False, True):
            rows = bench_gpu.measured(run, case, False, backward)
            timed = {row["implementation"]: row["timed"] for row in rows if row["ms"]}
            assert {"aten", "timm", "timm, compiled", "SDPA over channels"} <= timed.keys()
            assert timed["SDPA over channels"] == "graph"

    def test_a_call_that_waits_is_timed_without_a_graph(self):
        x = torch.ones(8, device=self.device)
        waits = bench_gpu.on_gpu([lambda: x[: int(x[0])] + 1] * 2)
        assert waits.how == "eager"
        assert waits.why.startswith("no graph: ")
        assert waits.turn() > 0
        after = bench_gpu.on_gpu([lambda: x + 1] * 2)
        assert after.how == "graph"
        assert 0 < after.turn() < waits.turn()

    def test_times_are_those_of_the_card(self):
        a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        once = bench_gpu.on_gpu([lambda: a @ a] * 2).turn()
        twice = bench_gpu.on_gpu([lambda: a @ a @ a] * 2).turn()
        assert 1.5 < twice / once < 2.5
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
