# RetinaNet: mmdet's, around a backbone of vitarium. All authors have these numbers.
# Its pyramid begins at stride 8: the map before that is not made, so nothing is left untrained.
_base_ = __import__("mmdet").__path__[0] + "/.mim/configs/_base_/models/retinanet_r50_fpn.py"
model = {
    "backbone": {
        "_delete_": True,
        "type": "FeatureBackbone",
        "task": "det",
        "out_indices": (1, 2, 3),
    },
    "neck": {"start_level": 0},
}
