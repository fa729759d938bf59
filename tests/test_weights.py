"""The registry of released weights: what is said of a file agrees with everything else."""

import re
from collections import Counter
from urllib.parse import urlsplit

import pytest
import timm
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from vitarium.backbones import _released
from vitarium.backbones._registry import Published, entries
from vitarium.checkpoints import Weight
from vitarium.heads.features import FeatureBackbone

MODULES = {module.__name__.rpartition(".")[2]: module for module in entries().values()}
WEIGHTS = {name: w for module in MODULES.values() for name, w in module._WEIGHTS.items()}
RESULTS = {name: r for module in MODULES.values() for name, r in module._PUBLISHED.items()}
CLASSIFIERS = {name: w for name, w in WEIGHTS.items() if w.task == "cls"}
DENSE = {name: w for name, w in WEIGHTS.items() if w.task != "cls"}
# Hosts whose links open in a browser only.
CLOUD_DRIVES = r"1drv\.ms|onedrive|sharepoint|drive\.google|pan\.baidu|dropbox"
# Files without a published figure: pre-training, copies, what only timm gives out, and our own.
WITHOUT_RESULT = r"\w+\.\w+_in22k|.*_hf|\w+\.msft_florence2|fused_swin_s3_\w+\.ms_in1k|.*_digits"


def kinds(weight):
    return {kind for kind in ("url", "file", "manual", "unreleased") if getattr(weight, kind)}


def test_all_families_have_released_weights():
    assert len(WEIGHTS) > 230
    assert {name.partition(".")[0] for name in WEIGHTS} <= entries().keys()
    for family, module in MODULES.items():
        assert module._WEIGHTS, family
        for name in module._WEIGHTS:
            assert entries()[name.partition(".")[0]] is module


def test_no_address_is_given_twice():
    addresses = Counter(address for w in WEIGHTS.values() for address in w.addresses)
    assert [address for address, count in addresses.items() if count > 1] == []
    texts = Counter(w.manual for w in WEIGHTS.values() if w.manual)
    assert [text for text, count in texts.items() if count > 1] == []


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_file_has_one_way_to_it(name):
    weight = WEIGHTS[name]
    assert len(kinds(weight)) == 1
    for address in weight.addresses:
        assert urlsplit(address).scheme == "https"
        assert not re.search(CLOUD_DRIVES, address, re.IGNORECASE)
    if weight.manual:
        assert re.search(CLOUD_DRIVES, weight.manual, re.IGNORECASE)
        assert "https://" in weight.manual
        assert not weight.manual.endswith(".")  # a sentence follows in `fetch`
    licences = {"none stated", "mit", "apache-2.0"}
    assert weight.licence.lower() in licences
    assert (weight.code_licence or "none stated").lower() in licences
    if weight.unreleased:
        assert weight.licence == "none stated"


def test_whose_dense_code_is_in_copies_of_openmmlab_s():
    """Agent Attention, Swin and DaViT ship mmdetection and mmsegmentation, with their licence."""
    copies = re.compile(r"agent_|fused_").match
    stated = {name: weight.code_licence for name, weight in WEIGHTS.items()}
    expected = {name: "Apache-2.0" if name in DENSE and copies(name) else None for name in WEIGHTS}
    assert stated == expected


def test_only_what_a_program_can_fetch_is_pretrained_for_timm():
    pretrained = set(timm.list_pretrained())
    for name, weight in WEIGHTS.items():
        reachable = name in CLASSIFIERS and bool(weight.url or weight.file)
        assert (name in pretrained) == reachable, name


def test_detectors_and_segmenters_are_no_tags():
    assert DENSE.keys().isdisjoint(timm.list_models(include_tags=True))
    for name, weight in DENSE.items():
        org, _, setting = name.partition(".")[2].partition("_")
        assert org.isalpha()
        segmenter = "upernet" in setting or "semantic_fpn" in setting or "mask2former" in setting
        assert weight.task == ("seg" if segmenter else "det"), name


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_tag_s_description_is_its_network_s(name):
    cfg = get_pretrained_cfg(name)
    weight = CLASSIFIERS[name]
    assert cfg.url == weight.url
    assert cfg.license == weight.licence
    if name.endswith(("_in22k", "_florence2", "_digits")):
        assert (
            cfg.num_classes
            == {"in22k": 21841, "florence2": 0, "digits": 10}[name.rpartition("_")[2]]
        )
    else:
        assert cfg.num_classes == 1000
    for side in re.findall(r"(?<![0-9])(?:192|224|256|288|384|448)(?![0-9])", name)[-1:]:
        assert cfg.input_size == (3, int(side), int(side))
    model = timm.create_model(name, device="meta")
    assert model.num_classes == cfg.num_classes
    names = model.state_dict().keys()
    assert f"{cfg.first_conv}.weight" in names
    assert (f"{cfg.classifier}.weight" in names) == (cfg.num_classes > 0)


@pytest.mark.parametrize(
    ("entry", "task"), sorted({(name.partition(".")[0], w.task) for name, w in DENSE.items()})
)
def test_a_detector_s_backbone_is_in_the_zoo(entry, task):
    backbone = FeatureBackbone(entry, task=task, device="meta")
    assert len(backbone.channels) == 4


@pytest.mark.parametrize(
    ("name", "resized", "side"),
    [
        # Agent Attention's code squashes every image; with TEST.CROP False it crops none.
        ("agent_deit_small.leaplab_in1k_448", (512, 512), 448),
        ("agent_pvt_medium.leaplab_in1k_256", (292, 292), 256),
        ("agent_cswin_base_384.leaplab_in1k", (438, 438), 384),
        ("agent_swin_tiny.leaplab_in1k", (256, 256), 224),
        ("agent_swin_small_288.leaplab_in1k", (288, 288), 288),
        ("agent_swin_base_384.leaplab_in1k", (384, 384), 384),
        # Swin's squashes at 384 only, the others' never.
        ("fused_swin_base_patch4_window12_384.microsoft_in1k", (384, 384), 384),
        ("fused_swinv2_tiny_window8_256.microsoft_in1k", (438, 292), 256),
        ("biformer_tiny.rayleizhu_in1k", (384, 256), 224),
        ("nat_tiny.shi_in1k", (384, 256), 224),
    ],
)
def test_images_are_prepared_as_where_the_result_was_measured(name, resized, side):
    """The size of a photograph of 600 x 400 pixels (width first) after resizing, then cropped."""
    config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
    transform = create_transform(**config)
    resize, crop, *_ = transform.transforms
    image = resize(Image.new("RGB", (600, 400)))
    assert image.size == resized
    assert crop(image).size == (side, side)


def test_every_file_has_a_result_or_is_known_to_have_none():
    assert RESULTS.keys() <= WEIGHTS.keys()
    without = WEIGHTS.keys() - RESULTS.keys()
    assert {name for name in without if not re.fullmatch(WITHOUT_RESULT, name)} == set()
    assert {name for name in RESULTS if re.fullmatch(WITHOUT_RESULT, name)} == set()
    for name, result in RESULTS.items():
        assert re.fullmatch(r"README of [\w.-]+/[\w.-]+, [0-9a-f]{7}", result.source)
        assert (result.top1 is None) == (name in DENSE)
        assert bool(result.metrics) == (name in DENSE)
        figures = [*result.metrics.values(), *([result.top1] if result.top1 else [])]
        assert all(30 < figure < 95 for figure in figures), name


def test_copies_beside_the_authors_files_are_of_the_same_network():
    """transformers' copies, timm's: what timm is told differs in the file and the evaluation."""
    pairs = [
        *((name, name.removesuffix("_hf")) for name in CLASSIFIERS if name.endswith("_hf")),
        *((name, name.replace(".microsoft_", ".ms_")) for name in CLASSIFIERS if ".mic" in name),
        *((name, name.replace(".dingmyu_", ".msft_")) for name in CLASSIFIERS if ".ding" in name),
    ]
    alone = {name for name, twin in pairs if twin not in CLASSIFIERS}
    assert alone == {
        "fused_swin_tiny_c24_patch4_window8_256.microsoft_in1k",
        "fused_davit_giant.dingmyu_ft_in1k",
    }
    assert len(pairs) - len(alone) == 11 + 28 + 3
    for name, twin in pairs:
        if name not in alone:
            mine, other = get_pretrained_cfg(name), get_pretrained_cfg(twin)
            assert WEIGHTS[name].url != WEIGHTS[twin].url
            for field in ("input_size", "num_classes", "mean", "std", "interpolation"):
                assert getattr(mine, field) == getattr(other, field), (name, field)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        (
            "fused_swin_small_patch4_window7_224.microsoft_in22k_ft_in1k",
            "v1.0.8/swin_small_patch4_window7_224_22kto1k_finetune.pth",
        ),
        (
            "fused_swin_base_patch4_window12_384.microsoft_in22k",
            "v1.0.0/swin_base_patch4_window12_384_22k.pth",
        ),
        (
            "fused_swinv2_large_window12to24_192to384.microsoft_in22k_ft_in1k",
            "v2.0.0/swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth",
        ),
        (
            "fused_swinv2_tiny_window8_256.ms_in1k",
            "https://huggingface.co/timm/swinv2_tiny_window8_256.ms_in1k/resolve/main/"
            "model.safetensors",
        ),
        (
            "nat_small.shi_cascade_mask_rcnn_3x_coco",
            "https://shi-labs.com/projects/nat/checkpoints/DET/nat_small_cascademaskrcnn.pth",
        ),
        (
            "dinat_large_11x11.shi_in22k_ft_in1k_384_hf",
            "https://huggingface.co/shi-labs/dinat-large-11x11-in22k-in1k-384/resolve/main/"
            "pytorch_model.bin",
        ),
    ],
)
def test_addresses_made_from_rows(name, url):
    assert WEIGHTS[name].url.endswith(url)


def test_a_row_of_a_dense_table():
    tables = {
        "moby_cascade_mask_rcnn_1x_coco": {"tiny": (48.1, 41.5, "a")},
        "upernet_160k_ade20k": {"tiny": (44.0, "b"), "small": (47.6, 49.4, None)},
    }

    def weight(file, task):
        return Weight(unreleased="lost") if file is None else Weight(url=f"https://x.y/{file}")

    weights, results = _released.dense("org", "README", tables, weight, "swin_{}")
    assert [w.url for w in weights.values()] == ["https://x.y/a", "https://x.y/b", None]
    assert results == {
        "swin_tiny.org_moby_cascade_mask_rcnn_1x_coco": Published(
            source="README",
            setting="Cascade Mask R-CNN, 1x, COCO, pretrained by MoBY",
            metrics={"box AP": 48.1, "mask AP": 41.5},
        ),
        "swin_tiny.org_upernet_160k_ade20k": Published(
            source="README", setting="UPerNet, 160k, ADE20K", metrics={"mIoU": 44.0}
        ),
        "swin_small.org_upernet_160k_ade20k": Published(
            source="README",
            setting="UPerNet, 160k, ADE20K",
            metrics={"mIoU": 47.6, "mIoU ms": 49.4},
        ),
    }
