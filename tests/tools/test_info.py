import json

from vitarium.tools.list import catalogue


def test_tells_all_facts(program):
    status, out, err = program("info", "nat_tiny")
    assert (status, err) == (0, "")
    facts = dict(line.split("  ", 1) for line in out.splitlines())
    facts = {name: fact.strip() for name, fact in facts.items()}
    assert facts["model"] == "nat_tiny.shi_in1k"
    assert facts["params"] == "27,901,582"
    assert facts["GFLOPs"] == "4.29 multiply-adds, counted at 224 x 224"
    assert facts["published"].startswith("4.3 GFLOPs (README of ")
    assert facts["top-1"].startswith("83.2 % (README of ")
    assert facts["input"].startswith("224 x 224")
    assert facts["channels"] == "64, 128, 256, 512 at strides 4, 8, 16, 32"
    assert facts["ops"] == "neighborhood"
    assert facts["weights"].startswith("download: https://shi-labs.com/")
    assert facts["licence"] == "of the weights: none stated"
    assert "arXiv:2204.07143" in facts["family"]
    assert facts["mean, std"] == "0.485, 0.456, 0.406; 0.229, 0.224, 0.225"


def test_a_fact_that_nobody_states_is_called_that(program):
    lines = program("info", "nat_atto").out.splitlines()
    assert [line.split()[1:] for line in lines if line.startswith("top-1")] == [["not", "stated"]]


def test_json_is_the_row_of_the_catalogue(program):
    model = next(m for m in catalogue() if m["entry"] == "nat_base")
    for name in ("nat_base", "nat_base.shi_in1k"):
        assert json.loads(program("info", name, "--json").out) == model


def test_unknown_models_and_tags(program):
    status, out, err = program("info", "nat_bass")
    assert (status, out) == (1, "")
    assert err.startswith("vitarium: error: unknown model 'nat_bass'; did you mean nat_base, ")
    assert err.count("\n") == 1
    assert program("info", "nat_base.in22k").err.startswith(
        "vitarium: error: unknown model 'nat_base.in22k'; did you mean nat_base"
    )
