"""mmcv's operators on torch and torchvision: values, gradients, and what is asked of the module."""

import importlib
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")

import mmdet_operators as suite
from mmcv import ops
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

from vitarium.heads.mmdet import operators

pytestmark = pytest.mark.filterwarnings("ignore:This overload of addmm:UserWarning")


@pytest.fixture
def absent(monkeypatch):
    """mmcv as before anything was put in place of its compiled module."""
    monkeypatch.delitem(sys.modules, "mmcv._ext")


@pytest.mark.parametrize("name", suite.CASES)
def test_against_loops(name):
    assert suite.worst(name, cases=20, seed=1) <= suite.TOLERANCE


def test_a_wrong_operator_is_found(monkeypatch):
    right = suite.ops.roi_align
    monkeypatch.setattr(suite.ops, "roi_align", lambda *args: right(*args) * (1 + 1e-5))
    assert suite.worst("roi_align", cases=20, seed=1) > suite.TOLERANCE


def test_equal_scores_keep_the_order_of_boxes():
    boxes = torch.arange(200.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    scores = torch.arange(200) % 2 / 2 + 0.25
    expected = [*range(1, 200, 2), *range(0, 200, 2)]
    assert ops.nms(boxes, scores, 0.5)[1].tolist() == expected
    assert ops.soft_nms(boxes, scores, 0.5)[1].tolist() == expected
    groups = ops.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.5)
    assert [group.item() for group in groups] == expected


@pytest.mark.parametrize("shared", range(1, 10))
def test_an_overlap_at_the_threshold(shared):
    """A box within another one: exactly ``shared`` tenths, rounded to float32."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, shared]])
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, shared / 10)[1].tolist() == [0, 1]
    assert ops.nms(boxes, scores, shared / 10 - 1e-4)[1].tolist() == [0]
    groups = ops.nms_match(torch.cat([boxes, scores[:, None]], 1), shared / 10)
    assert [group.tolist() for group in groups] == [[0, 1]]
    assert ops.soft_nms(boxes, scores, shared / 10, method="naive")[1].tolist() == [0]


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_boxes_without_area(method):
    boxes = torch.tensor([[1.0, 1, 1, 1]] * 3 + [[0.0, 0, 4, 4]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert ops.nms(boxes, scores, 0.5)[1].tolist() == [0, 1, 2, 3]
    assert ops.nms(boxes, scores, 0.5, offset=1)[1].tolist() == [0, 3]
    dets, kept = ops.soft_nms(boxes, scores, 0.5, method=method)
    assert kept.tolist() == [0, 1, 2, 3]
    assert torch.equal(dets[:, 4], scores)


def test_soft_nms_takes_the_best_box_however_low():
    dets, kept = ops.soft_nms(torch.rand(3, 4), torch.tensor([1e-5, 1e-4, 1e-6]), min_score=0.1)
    assert kept.tolist() == [1]
    assert dets.shape == (1, 5)


def test_nothing_given():
    none, scores = torch.zeros(0, 4), torch.zeros(0)
    for function in (ops.nms, ops.soft_nms):
        dets, kept = function(none, scores, 0.5)
        assert dets.shape == (0, 5)
        assert kept.dtype == torch.int64
    maps = torch.zeros(1, 2, 4, 4, requires_grad=True)
    for output in (
        ops.roi_align(maps, torch.zeros(0, 5), 3, 1.0, 0, "avg", True),
        ops.roi_align(maps, torch.zeros(0, 5), 3, 1.0, 0, "max", True),
        ops.roi_pool(maps, torch.zeros(0, 5), 3, 1.0),
    ):
        assert output.shape == (0, 2, 3, 3)
        assert not torch.autograd.grad(output.sum(), maps)[0].any()
    assert ops.sigmoid_focal_loss(
        torch.zeros(0, 3), torch.zeros(0).long()
    ).isnan()  # a mean of none


def test_a_new_deformable_convolution_has_no_slope_at_the_border():
    """Offsets of 0: with padding 1 the outer taps lie a whole pixel outside."""
    layer = ops.DeformConv2dPack(1, 1, 3, padding=1)
    offset = torch.zeros(1, 18, 5, 5, requires_grad=True)
    image = torch.randn(1, 1, 5, 5)
    ops.deform_conv2d(image, offset, layer.weight, 1, 1).sum().backward()
    by_tap = offset.grad.view(3, 3, 2, 5, 5)
    assert not by_tap[0, :, :, 0].any()
    assert not by_tap[:, 0, :, :, 0].any()
    assert by_tap[1, 1].all()


POOLINGS = {
    "average": lambda x, rois: ops.roi_align(x, rois, 3, 1.0, 0, "avg", True),
    "two points": lambda x, rois: ops.roi_align(x, rois, 3, 1.0, 2, "avg", False),
    "greatest point": lambda x, rois: ops.roi_align(x, rois, 3, 1.0, 2, "max", True),
    "greatest pixel": lambda x, rois: ops.roi_pool(x, rois, 3, 1.0),
}


@pytest.mark.parametrize("pool", POOLINGS)
def test_regions_that_are_nowhere_show_nan(pool):
    good = torch.tensor([[0, 1.0, 2, 9, 8], [1, 3, 0, 12, 7]])
    bad = torch.tensor([[-1, 1.0, 2, 9, 8], [2, 1, 2, 9, 8], [torch.nan, 1, 2, 9, 8]])
    far = good[:1].repeat(4 * 5, 1)
    numbers = (torch.nan, torch.inf, -torch.inf, 1e30, -1e9)
    for row, (column, value) in enumerate((c, x) for c in range(1, 5) for x in numbers):
        far[row, column] = value
    x = torch.randn(2, 3, 10, 14, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = POOLINGS[pool](x, good)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    found = POOLINGS[pool](x, torch.cat([bad, good, far]))
    assert found[:3].isnan().all()
    assert found[5:].isnan().all()
    assert torch.equal(found[3:5], expected)
    (gradient,) = torch.autograd.grad(found, x, torch.ones_like(found))
    assert torch.equal(gradient, slope)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -3e9])
@pytest.mark.parametrize("modulated", [False, True])
def test_offsets_that_lead_nowhere_read_nothing(value, modulated):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator) for s in ((1, 2, 6, 7), (4, 2, 3, 3)))
    mask = torch.rand(1, 9, 6, 7, generator=generator)

    def run(far):
        moved = torch.zeros(1, 18, 6, 7)
        moved[0, :, 2, 3] = moved[0, 5, 4] = far
        moved.requires_grad_()
        leaf = x.clone().requires_grad_()
        if modulated:
            out = ops.modulated_deform_conv2d(leaf, moved, mask, weight, None, 1, 1)
        else:
            out = ops.deform_conv2d(leaf, moved, weight, 1, 1)
        return out, *torch.autograd.grad(out.square().sum(), (leaf, moved))

    for got, expected in zip(run(value), run(1e4), strict=True):
        assert torch.equal(got, expected)


def test_offsets_that_are_too_few():
    layer = ops.ModulatedDeformConv2d(1, 1, 3, padding=1)
    with pytest.raises(ValueError, match="expected at least 450 values.*got 288"):
        layer(torch.zeros(1, 1, 5, 5), torch.zeros(1, 18, 4, 4), torch.zeros(1, 9, 5, 5))


def calls(dtype):
    """Every operator with gradients: a function of tensors that want them, and the tensors."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        values = torch.randn(*shape, generator=generator).to(torch.bfloat16)
        return values.to(dtype).requires_grad_()

    rois = torch.tensor([[0.0, 1, 2, 6, 7], [1, 0, 0, 3, 4]]).to(dtype)
    target = torch.tensor([0, 2, 3])
    shapes, starts = torch.tensor([[4, 4], [2, 2]]), torch.tensor([0, 16])
    kernel = (2, 1, 1, 2, 2)  # stride, padding, dilation, groups of channels and of offsets
    return {
        "roi_align": (lambda x: ops.roi_align(x, rois, 2, 0.5, 0, "avg", True), [some(2, 3, 4, 4)]),
        "roi_pool": (lambda x: ops.roi_pool(x, rois, 2, 0.5), [some(2, 3, 4, 4)]),
        "deform_conv": (
            lambda x, o, w: ops.deform_conv2d(x, o, w, *kernel),
            [some(2, 4, 6, 6), some(2, 36, 3, 3), some(6, 2, 3, 3)],
        ),
        "modulated_deform_conv": (
            lambda *tensors: ops.modulated_deform_conv2d(*tensors, *kernel),
            [some(2, 4, 6, 6), some(2, 36, 3, 3), some(2, 18, 3, 3), some(6, 2, 3, 3), some(6)],
        ),
        "focal_loss": (lambda x: ops.sigmoid_focal_loss(x, target), [some(3, 3)]),
        "ms_deform_attn": (
            lambda v, p, w: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, p, w, 64),
            [some(2, 20, 2, 4), some(2, 5, 2, 2, 3, 2), some(2, 5, 2, 2, 3)],
        ),
        "carafe": (lambda x, m: ops.carafe(x, m, 3, 2, 2), [some(2, 4, 3, 3), some(2, 18, 6, 6)]),
    }


NAMES = list(calls(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_single(name, dtype):
    function, tensors = calls(dtype)[name]
    output = function(*tensors)
    assert output.dtype == dtype
    wide, singles = calls(torch.float32)[name]
    expected = wide(*singles)
    assert torch.allclose(output.float(), expected, rtol=2**-7, atol=1e-3)
    got = torch.autograd.grad(output.float().sum(), tensors)
    for a, b in zip(got, torch.autograd.grad(expected.sum(), singles), strict=True):
        assert a.dtype == dtype
        assert torch.allclose(a.float(), b, rtol=2**-6, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    function, tensors = calls(torch.float32)[name]
    expected = function(*tensors)
    slopes = torch.autograd.grad(expected.sum(), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        output = function(*tensors)
        assert torch.equal(output, expected)
        got = torch.autograd.grad(output.sum(), tensors)
    assert all(map(torch.equal, got, slopes))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    function, tensors = calls(torch.float64)[name]
    torch.manual_seed(1)
    for tensor in tensors:  # away from whole pixels, where slopes jump
        tensor.data += 0.013 * torch.rand_like(tensor)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_what_is_not_provided_says_so_when_it_is_called():
    boxes = torch.tensor([[3.0, 3, 2, 2, 0.1]])
    with pytest.raises(NotImplementedError, match="box_iou_rotated: this operator"):
        ops.box_iou_rotated(boxes, boxes)
    with pytest.raises(AttributeError, match="__path__"):
        sys.modules["mmcv._ext"].__path__  # noqa: B018


def test_names_are_mmcvs():
    """An operator under another name would never be called."""
    text = "".join(
        (path.read_text(encoding="utf-8"))
        for path in importlib.resources.files("mmcv.ops").iterdir()
        if path.name.endswith(".py")
    )
    names = [name for topic in operators._TOPICS for name in topic.__all__]
    assert len(names) == len({*names})
    assert [name for name in names if f"ext_module.{name}" not in text] == []


def test_the_environment_can_be_reported():
    from mmcv.utils import collect_env

    assert "vitarium" in collect_env()["MMCV Compiler"]


def test_a_compiled_mmcv_is_left_alone(absent, monkeypatch, tmp_path):
    import mmcv

    (tmp_path / "_ext.py").write_text("theirs = True\n")
    monkeypatch.setattr(mmcv, "__path__", [str(tmp_path)])
    operators.provide()
    assert "mmcv._ext" not in sys.modules
    compiled = importlib.import_module("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    operators.provide()
    assert sys.modules["mmcv._ext"].theirs


def test_numpy_arrays():
    dets, kept = ops.nms(np.array([[0, 0, 1, 1]], np.float32), np.array([0.5], np.float32), 0.5)
    assert isinstance(dets, np.ndarray)
    assert kept.tolist() == [0]
