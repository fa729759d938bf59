import json
from fnmatch import fnmatch

import pytest
from rich.console import Console

from vitarium.tools import list as tool


def _names(result):
    assert result.status == 0
    return [model["name"] for model in json.loads(result.out)]


def test_table_fits_80_columns_without_colours(program, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    status, out, err = program("list", "--task", "all")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    status, out, err = program("list")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) > len([m for m in tool.catalogue() if m["task"] == "cls"])  # some are long
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in out
    assert lines[0].split() == [
        *("model", "params", "GFLOPs", "top-1", "input", "weights", "their", "licence"),
    ]
    row = next(line for line in lines if line.startswith("nat_tiny.shi_in1k"))
    assert row.split()[1:6] == ["27.9M", "4.3", "83.2", "224", "download"]


def test_json_holds_every_fact(program):
    assert json.loads(program("list", "--json", "--task", "all").out) == tool.catalogue()


@pytest.mark.parametrize("task", ["cls", "det", "seg"])
def test_tasks(program, task):
    chosen = [model["name"] for model in tool.catalogue() if model["task"] == task]
    assert chosen
    assert _names(program("list", "--json", "--task", task)) == chosen
    if task == "cls":
        assert _names(program("list", "--json")) == chosen


def test_detectors_stand_in_a_table_of_their_own(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = program("list", "nat_mini", "--task", "all").out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == [
        *("model", "nat_mini.shi_in1k", "nat_mini.shi_in1k_hf", "detector"),
        *(f"nat_mini.shi_{kind}_3x_coco" for kind in ("cascade_mask_rcnn", "mask_rcnn")),
        "nat_mini.shi_upernet_160k_ade20k",
    ]
    assert "box AP 46.5, mask AP 41.7  download  none stated" in lines[5]


def test_globs_match_entries_and_tags(program):
    tags = ["nat_tiny.shi_in1k", "nat_tiny.shi_in1k_hf"]
    assert _names(program("list", "--json", "nat_t*")) == tags
    assert _names(program("list", "--json", "nat_tiny")) == tags
    everywhere = _names(program("list", "--json"))
    assert _names(program("list", "--json", "*.shi_in1k", "nat_atto")) == [
        name for name in everywhere if fnmatch(name, "*.shi_in1k") or name.startswith("nat_atto.")
    ]


def test_filters(program):
    small = _names(program("list", "--json", "nat_*", "--params-max", "28"))
    assert "nat_tiny.shi_in1k" in small
    assert "nat_small.shi_in1k" not in small
    assert _names(program("list", "--json", "nat_base*", "nat_t*", "--params-min", "60")) == [
        *("nat_base.shi_in1k", "nat_base.shi_in1k_hf")
    ]
    apache = _names(program("list", "--json", "nat_*", "--licence", "apache-2.0"))
    assert apache == ["nat_atto.vitarium_digits"]
    assert "nat_tiny.shi_in1k" in _names(program("list", "--json", "--licence", "mit"))


def test_permissive_is_both_code_and_weights_and_stated(program, monkeypatch):
    licences = [
        *(("MIT", "Apache-2.0"), ("MIT", "none stated"), ("none stated", "MIT")),
        *(("MIT", "CC-BY-NC-4.0"), ("MIT", None), ("none stated", None)),
    ]
    model = tool.catalogue()[0]
    models = [
        model | {"name": f"m.{i}", "licence": {"code": code, "weights": weights}}
        for i, (code, weights) in enumerate(licences)
    ]
    monkeypatch.setattr(tool, "catalogue", lambda: models)
    monkeypatch.setattr("vitarium_cli._tool", lambda name: tool)
    assert _names(program("list", "--json", "--licence", "permissive")) == ["m.0", "m.4"]


def test_weights_filter_keeps_what_a_program_can_fetch(program, monkeypatch):
    sources = ("download", "manual", "packaged", "not released", "none")
    model = tool.catalogue()[0]
    models = [model | {"name": f"m.{kind}", "weights": {"source": kind}} for kind in sources]
    monkeypatch.setattr(tool, "catalogue", lambda: models)
    monkeypatch.setattr("vitarium_cli._tool", lambda name: tool)
    assert len(_names(program("list", "--json"))) == 5
    assert _names(program("list", "--json", "--weights")) == ["m.download", "m.packaged"]


def test_a_long_name_is_folded_and_costs_no_number(capsys):
    model = tool.catalogue()[0] | {"name": "a" * 60, "params": 123_456_789, "gflops": 123.4}
    Console(width=80).print(tool._table([model]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("a" * 10) for line in lines) >= 5
    assert lines[1].split()[1:3] == ["123.5M", "123.4"]
    assert sum(len(line.split()[0]) for line in lines if line.startswith("aa")) == 60


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nat_tinny*"], "no model matches nat_tinny*; did you mean nat_tiny, "),
        (["zzz"], "no model matches zzz\n"),
        (["nat_*", "--params-max", "0.1"], "the filters leave none of "),
        (["nat_mini.shi_mask_rcnn_3x_coco"], "the filters leave none of 1 models (--task cls)"),
        (["--licence", "wtfpl"], "the filters leave none of "),
    ],
)
def test_no_match_is_an_error(argv, line, program):
    for extra in ([], ["--json"]):
        status, out, err = program("list", *argv, *extra)
        assert (status, out) == (1, "")
        assert err.startswith(f"vitarium: error: {line}")
        assert err.count("\n") == 1
