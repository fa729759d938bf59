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
    assert facts["input"] == "224 x 224, crop 0.875 (center), bicubic"
    assert facts["channels"] == "64, 128, 256, 512 at strides 4, 8, 16, 32"
    assert facts["ops"] == "neighborhood"
    assert facts["weights"].startswith("download: https://shi-labs.com/")
    assert facts["wrapper"] == "plain"
    assert facts["size"] == facts["sha256"] == "not published"
    assert facts["licence"] == "of the weights: none stated"
    assert facts["other tags"] == "nat_tiny.shi_in1k_hf"
    assert facts["detectors"].split(", ") == [
        f"nat_tiny.shi_{kind}_3x_coco" for kind in ("cascade_mask_rcnn", "mask_rcnn")
    ]
    assert facts["segmenters"] == "nat_tiny.shi_upernet_160k_ade20k"
    assert "arXiv:2204.07143" in facts["family"]
    assert facts["mean, std"] == "0.485, 0.456, 0.406; 0.229, 0.224, 0.225"


def test_a_fact_that_nobody_states_is_called_that(program):
    lines = program("info", "nat_atto").out.splitlines()
    assert [line.split()[1:] for line in lines if line.startswith("top-1")] == [["not", "stated"]]


def test_how_the_images_of_a_tag_are_prepared(program):
    squashed = _facts(program, "agent_swin_base_384")["input"]
    assert squashed == "384 x 384, crop 1.0 (squash), bicubic"


def _facts(program, name):
    status, out, err = program("info", name)
    assert (status, err) == (0, "")
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in out.splitlines()}


def test_a_detector(program):
    facts = _facts(program, "nat_mini.shi_mask_rcnn_3x_coco")
    assert facts["params"].endswith(", of the backbone")
    assert facts["setting"] == "Mask R-CNN, 3x, COCO"
    assert facts["result"].startswith("box AP 46.5 %, mask AP 41.7 % (README of ")
    assert facts["weights"].endswith("/DET/nat_mini_maskrcnn.pth")
    assert facts["wrapper"] == "state_dict"
    assert facts["detectors"] == "nat_mini.shi_cascade_mask_rcnn_3x_coco"
    assert "input" not in facts


def test_weights_that_no_program_can_fetch(program):
    facts = _facts(program, "biformer_tiny")
    assert facts["weights"].startswith("manual: Save https://1drv.ms/")
    assert "or the file in the authors' folder, https://1drv.ms/" in facts["weights"]
    assert "sha256" in facts
    facts = _facts(program, "biformer_base.rayleizhu_upernet_160k_ade20k")
    assert facts["weights"] == "not released: the authors publish training logs only"
    assert {"sha256", "size", "licence"}.isdisjoint(facts)
    assert _facts(program, "nat_isotropic_small").keys().isdisjoint({"mirrors", "detectors"})
    assert _facts(program, "dinat_s_tiny")["mirrors"].endswith("dinat_s_tiny_1k_224.pth")
    assert _facts(program, "dinat_atto")["weights"] == "none"


def test_json_is_the_row_of_the_catalogue_and_what_stands_beside_it(program):
    model = next(m for m in catalogue() if m["entry"] == "nat_base")
    beside = {
        "other_tags": ["nat_base.shi_in1k_hf"],
        "detectors": ["nat_base.shi_cascade_mask_rcnn_3x_coco"],
        "segmenters": ["nat_base.shi_upernet_160k_ade20k"],
    }
    for name in ("nat_base", "nat_base.shi_in1k"):
        assert json.loads(program("info", name, "--json").out) == model | beside


def test_unknown_models_and_tags(program):
    status, out, err = program("info", "nat_bass")
    assert (status, out) == (1, "")
    assert err.startswith("vitarium: error: unknown model 'nat_bass'; did you mean nat_base, ")
    assert err.count("\n") == 1
    assert program("info", "nat_base.in22k").err.startswith(
        "vitarium: error: unknown model 'nat_base.in22k'; did you mean nat_base"
    )


def test_a_name_is_proposed_once(program):
    err = program("info", "nat_tiny.shi").err
    proposed = err.strip().partition("did you mean ")[2].rstrip("?").split(", ")
    assert len(proposed) == len(set(proposed)) == 3
