import json

import pytest
import timm

from vitarium.backbones._registry import entries
from vitarium.heads.features import FeatureBackbone
from vitarium.tools import catalogue


@pytest.fixture(scope="module")
def rows():
    return catalogue.records()


@pytest.fixture(autouse=True)
def counted_once(rows, monkeypatch):
    """Every model's operations are counted once, not in every test."""
    monkeypatch.setattr(catalogue, "records", lambda: rows)


def test_the_generated_files_are_fresh(capsys):
    assert catalogue.main(["--check"]) == 0, capsys.readouterr().err


def test_every_tag_of_every_entry_has_a_row(rows):
    rows = [row for row in rows if row["task"] == "cls"]
    known = {name for entry in entries() for name in timm.list_models(f"{entry}.*")}
    listed = [row["name"] for row in rows]
    assert len(listed) == len(set(listed))
    ours = {n for n in timm.list_models(include_tags=True) if n.partition(".")[0] in entries()}
    assert set(listed) == ours
    assert known <= ours
    assert {row["entry"] for row in rows if row["default"]} == entries().keys()


def test_every_detector_and_segmenter_has_a_row(rows):
    files = {
        name: weight
        for module in entries().values()
        for name, weight in module._WEIGHTS.items()
        if weight.task != "cls"
    }
    dense = {row["name"]: row for row in rows if row["task"] != "cls"}
    assert dense.keys() == files.keys()
    assert len(dense) > 80
    keys = {frozenset(row) for row in rows}
    assert len(keys) == 1  # who reads a row finds the same facts in all
    for name, row in dense.items():
        assert row["task"] == files[name].task
        assert row["metrics"]
        assert row["setting"]
        assert not row["default"]
    row = dense["agent_swin_tiny.leaplab_mask_rcnn_1x_coco"]
    assert row["metrics"] == {"box AP": 44.6, "mask AP": 40.7}
    assert row["setting"] == "Mask R-CNN, 1x, COCO"
    assert row["licence"] == {"code": "Apache-2.0", "weights": "none stated"}
    backbone = FeatureBackbone("agent_swin_tiny", task="det", device="meta")
    assert row["params"] == sum(p.numel() for p in backbone.parameters())


def test_what_is_left_out_is_said_of_its_family(rows):
    families = catalogue._markdown(rows).split("\n## ")
    said = [family.split()[0] for family in families if "\nLeft out: " in family]
    assert said == ["fused"]


def test_a_family_s_classifiers_stand_before_its_dense_files(rows):
    order = [row["task"] != "cls" for row in rows if row["family"] == "dinat"]
    assert order == sorted(order)


def test_a_row_s_facts_are_the_model_s(rows):
    row = next(row for row in rows if row["entry"] == "nat_mini")
    assert row["params"] == 19_984_174
    assert (row["published_gflops"], row["top1"]) == (2.7, 81.8)
    assert row["channels"] == [64, 128, 256, 512]
    assert row["strides"] == [4, 8, 16, 32]
    assert row["ops"] == ["neighborhood"]
    assert row["licence"] == {"code": "MIT", "weights": "none stated"}


def test_counted_operations_are_the_published_ones(rows):
    published = [row for row in rows if row["published_gflops"]]
    assert len(published) > 20
    for row in published:
        assert row["gflops"] == pytest.approx(row["published_gflops"], rel=0.03), row["name"]


def test_ops_are_those_that_run(rows):
    ops = {row["entry"]: row["ops"] for row in rows}
    assert ops["dinat_s_tiny"] == ops["nat_isotropic_small"] == ["neighborhood"]
    assert ops["vitrpb_small"] == []


def test_stale_files_are_told_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "_PACKAGE", tmp_path / "vitarium")
    monkeypatch.setattr(catalogue, "_ROOT", tmp_path)
    (tmp_path / "vitarium").mkdir()
    (tmp_path / "MODELS.md").write_text("old", encoding="utf-8")
    assert catalogue.main(["--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "models.json is stale: run python -m vitarium.tools.catalogue",
        "MODELS.md is stale: run python -m vitarium.tools.catalogue",
    ]
    assert catalogue.main([]) == 0
    rows = json.loads((tmp_path / "vitarium" / "models.json").read_text(encoding="utf-8"))
    table = (tmp_path / "MODELS.md").read_text(encoding="utf-8")
    for row in rows:
        size = f"| {row['params']:,} |"
        assert any(
            line.startswith(f"| `{row['name']}` |") and size in line for line in table.splitlines()
        )
    capsys.readouterr()
    assert catalogue.main(["--check"]) == 0
    assert catalogue.main([]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("weight", "source"),
    [
        (None, {"source": "none"}),
        ({"file": "a.safetensors", "size": 5}, {"source": "packaged", "address": "a.safetensors"}),
        ({"url": "https://a.b/c.pth"}, {"source": "download", "address": "https://a.b/c.pth"}),
        ({"manual": "ask them"}, {"source": "manual", "address": "ask them"}),
        ({"unreleased": "lost"}, {"source": "not released", "address": "lost"}),
    ],
)
def test_where_weights_come_from(weight, source):
    found = catalogue._source(weight and catalogue.Weight(**weight))
    assert {key: found[key] for key in source} == source
    assert found.get("size") == (weight or {}).get("size")


@pytest.mark.parametrize(
    ("weights", "cell"),
    [
        ({"source": "none"}, "none"),
        ({"source": "not released", "address": "lost"}, "not released"),
        ({"source": "download", "address": "https://a.b/c?dl=1"}, "[download](https://a.b/c?dl=1)"),
        (
            {"source": "manual", "address": "Save https://a.b/s!c from a browser; see https://d.e"},
            "[manual](https://a.b/s!c)",
        ),
        ({"source": "manual", "address": "Open https://a.b/c."}, "[manual](https://a.b/c)"),
    ],
)
def test_a_table_leads_to_the_first_address(weights, cell):
    assert catalogue._link(weights) == cell
