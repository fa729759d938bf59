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
    status, out, err = program("list")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) > len(tool.catalogue())  # long names take two lines
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in out
    assert lines[0].split() == [
        *("model", "params", "GFLOPs", "top-1", "input", "weights", "their", "licence"),
    ]
    row = next(line for line in lines if line.startswith("nat_tiny.shi_in1k"))
    assert row.split()[1:6] == ["27.9M", "4.3", "83.2", "224", "download"]


def test_json_holds_every_fact(program):
    assert json.loads(program("list", "--json").out) == tool.catalogue()


def test_globs_match_entries_and_tags(program):
    assert _names(program("list", "--json", "nat_t*")) == ["nat_tiny.shi_in1k"]
    assert _names(program("list", "--json", "nat_tiny")) == ["nat_tiny.shi_in1k"]
    everywhere = _names(program("list", "--json"))
    assert _names(program("list", "--json", "*.shi_in1k", "nat_atto")) == [
        name for name in everywhere if fnmatch(name, "*.shi_in1k") or name.startswith("nat_atto.")
    ]


def test_filters(program):
    small = _names(program("list", "--json", "nat_*", "--params-max", "28"))
    assert "nat_tiny.shi_in1k" in small
    assert "nat_small.shi_in1k" not in small
    assert _names(program("list", "--json", "nat_base*", "nat_t*", "--params-min", "60")) == [
        "nat_base.shi_in1k"
    ]
    permissive = _names(program("list", "--json", "nat_*", "--licence", "permissive"))
    assert permissive == ["nat_atto.vitarium_digits"]
    assert _names(program("list", "--json", "nat_*", "--licence", "apache-2.0")) == permissive
    assert "nat_tiny.shi_in1k" in _names(program("list", "--json", "--licence", "mit"))


def test_weights_filter_keeps_what_a_program_can_fetch(program, monkeypatch):
    first, second, third = tool.catalogue()[:3]
    first["weights"] = {"source": "download"}
    second["weights"] = {"source": "manual"}
    third["weights"] = {"source": "none"}
    monkeypatch.setattr(tool, "catalogue", lambda: [first, second, third])
    monkeypatch.setattr("vitarium_cli._tool", lambda name: tool)
    assert len(_names(program("list", "--json"))) == 3
    assert _names(program("list", "--json", "--weights")) == [first["name"]]


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
        (["--licence", "wtfpl"], "the filters leave none of "),
    ],
)
def test_no_match_is_an_error(argv, line, program):
    for extra in ([], ["--json"]):
        status, out, err = program("list", *argv, *extra)
        assert (status, out) == (1, "")
        assert err.startswith(f"vitarium: error: {line}")
        assert err.count("\n") == 1
