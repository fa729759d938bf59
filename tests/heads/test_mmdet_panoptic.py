"""Panoptic quality: of counts made by loops, and of mmdet's measure."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

pytest.importorskip("mmdet")

import vitarium.heads.mmdet  # noqa: F401
from vitarium.heads.mmdet import panoptic

if sys.modules["panopticapi"].__spec__.origin != panoptic.__name__:
    pytest.skip("panopticapi is installed", allow_module_level=True)


def test_colours_are_numbers_in_base_256():
    assert panoptic.rgb2id((3, 2, 1)) == 3 + 2 * 256 + 256**2
    ids = np.random.default_rng(0).integers(0, 256**3, (5, 7))
    picture = panoptic.id2rgb(ids)
    assert picture.dtype == np.uint8
    assert (panoptic.rgb2id(picture) == ids).all()
    assert (panoptic.rgb2id(picture.astype(np.int64)) == ids).all()
    for number, colour in zip(ids.flat, picture.reshape(-1, 3), strict=True):
        assert panoptic.rgb2id(colour) == number
        assert panoptic.id2rgb(number) == colour.tolist()


def test_qualities_are_means_over_classes_that_occur():
    one, two = panoptic.PQStat(), panoptic.PQStat()
    one[1].tp, one[1].iou, one[1].fp = 2, 1.5, 1
    two[1].fn, two[3].fn = 1, 4
    one += pickle.loads(pickle.dumps(two))
    categories = {1: {"isthing": 1}, 2: {"isthing": 1}, 3: {"isthing": 0}, 4: {"isthing": 0}}
    means, classes = one.pq_average(categories, None)
    assert classes[1] == {"pq": 0.5, "sq": 0.75, "rq": pytest.approx(2 / 3)}
    assert classes[2] == classes[3] == classes[4] == {"pq": 0, "sq": 0, "rq": 0}
    assert [*classes] == [1, 2, 3, 4]
    assert means == {"pq": 0.25, "sq": 0.375, "rq": pytest.approx(1 / 3), "n": 2}
    means, classes = one.pq_average(categories, True)
    assert (means["pq"], means["n"], [*classes]) == (0.5, 1, [1, 2])
    means, _ = one.pq_average({4: {"isthing": 0}}, False)
    assert means == {"pq": 0, "sq": 0, "rq": 0, "n": 0}


def test_what_is_not_among_them_is_an_import_error():
    with pytest.raises(ImportError, match="IdGenerator"):
        from panopticapi.utils import IdGenerator  # noqa: F401
