"""``vitarium bench digits``: that it trains what it says, and what it makes of the results."""

from __future__ import annotations

import csv

import pytest
from rich.console import Console

import vitarium_cli
from vitarium.tools import bench_digits

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")


def row(model, top1, seconds):
    wrong = round(3.6 * (100 - top1))
    return {"model": model, "param_count": 1.0, "top1": top1, "wrong": wrong, "cpu_s": seconds}


def test_one_short_training(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "short.toml"
    shipped = bench_digits.Path(vitarium_cli.__file__).parent / "vitarium/configs/classification"
    text = (shipped / "atto_digits.toml").read_text()
    assert "epochs = 30\n" in text
    recipe.write_text(text.replace("epochs = 30\n", "updates = 2\n"))
    monkeypatch.setattr(bench_digits, "RECIPE", str(recipe))
    file = tmp_path / "digits.csv"
    assert vitarium_cli.main(["bench", "digits", "agent_pvt_atto", "--csv", str(file)]) == 0
    lines = file.read_text().splitlines()
    (found,) = csv.DictReader(lines[1:])
    assert found["model"] == "agent_pvt_atto"
    assert 0 < float(found["top1"]) < 60
    assert float(found["cpu_s"]) > 1
    assert "goal 97 %: missed" in capsys.readouterr().out


def test_goals_are_ours_only(monkeypatch, capsys):
    results = {
        "nat_atto": row("nat_atto", 97.5, 400.0),
        "convnext_atto": row("convnext_atto", 90.0, 900.0),
    }
    monkeypatch.setattr(bench_digits, "_trained", lambda shown, model: results[shown])
    kept = []
    bench_digits.measure(Console(), [*results], 1, lambda rows: kept.append(len(rows)))
    assert kept == [1, 2]
    out = capsys.readouterr().out
    assert "least of ours: 97.50 %, goal 97 %: met" in out
    assert "longest of ours: 400 s, goal 480 s: met" in out


def test_a_training_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(bench_digits, "RECIPE", "no_such_thing")
    with pytest.raises(RuntimeError, match="no_such_thing"):
        bench_digits.measure(Console(), ["nat_atto"], 2, lambda rows: None)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("nat_atto", 98.0, 300.0), row("convnext_atto", 98.6, 200.0)]
    (file,) = bench_digits.draw(rows, tmp_path)
    assert file.stat().st_size > 5000
