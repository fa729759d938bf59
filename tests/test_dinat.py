"""Dilations of DiNAT and DiNAT_s: which block has which, in classification and in dense form."""

import pytest
import timm
import torch

from vitarium.backbones._blocks import NeighborhoodAttention
from vitarium.heads.features import FeatureBackbone

COCO_MINI = [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]
COCO_S_TINY = [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]
ADE_TINY = [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]]
ADE_LARGE = [
    [1, 20, 1],
    [1, 5, 1, 10],
    [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5],
    [1, 2, 1, 2, 1],
]
MASK2FORMER = [
    [1, 14, 1],
    [1, 4, 1, 7],
    [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3],
    [1, 1, 1, 1, 1],
]


def dilations(model):
    found = []
    for name, module in model.named_modules():
        if isinstance(module, NeighborhoodAttention):
            level = int(name.partition("blocks")[0].split(".")[-2])
            found += [[] for _ in range(level + 1 - len(found))]
            found[level].append(module.dilation)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dinat_mini", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]),
        ("dinat_large_384", [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_large_11x11", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_s_tiny", [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]),
    ],
)
def test_classification(name, expected):
    assert dilations(timm.create_model(name, device="meta")) == expected


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("dinat_mini", "det", COCO_MINI),
        ("dinat_s_tiny", "det", COCO_S_TINY),
        ("dinat_tiny", "seg", ADE_TINY),
        ("dinat_large.shi_in22k", "seg", ADE_LARGE),
        ("dinat_large_11x11", "seg", MASK2FORMER),
        ("dinat_large_11x11", "det", MASK2FORMER),
    ],
)
def test_dense_form(name, task, expected):
    assert dilations(FeatureBackbone(name, task=task, device="meta")) == expected


def test_what_the_caller_asks_for_counts_more():
    own = [[1, 2], [1, 3], [1, 1], [1]]
    backbone = FeatureBackbone("dinat_s_atto", task="det", dilations=own, device="meta")
    assert dilations(backbone) == own
    shallow = FeatureBackbone("dinat_mini", task="det", depths=(2, 2, 2, 2), device="meta")
    assert dilations(shallow) == [[1, 28], [1, 7], [1, 3], [1, 3]]
    assert dilations(FeatureBackbone("dinat_mini", device="meta"))[0] == [1, 8, 1]


def test_dilation_one_is_nat():
    args = {"kernel_size": (7, 5, 3, 3), "dilations": 1}
    nat, dinat = timm.create_model("nat_atto").eval(), timm.create_model("dinat_atto", **args)
    dinat.eval().load_state_dict(nat.state_dict())
    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        assert torch.equal(nat(x), dinat(x))
        assert not torch.equal(
            nat(x), timm.create_model("dinat_atto", **args | {"dilations": 2})(x)
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((2, 2), r"dilations: expected one per level \(4\), got \(2, 2\)"),
        (([1, 2, 1], 1, 1, 1), r"dilations: .* each of a level's 2 blocks, got \(1, 2, 1\)"),
        ((0, 1, 1, 1), "dilations: expected steps of at least 1, got 0"),
    ],
)
def test_wrong_dilations_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("dinat_atto", dilations=value)
