# DINO with four scales: mmdet's data, schedule and network, around a backbone of vitarium.
_base_ = __import__("mmdet").__path__[0] + "/.mim/configs/dino/dino-4scale_r50_8xb2-12e_coco.py"
model = {
    "backbone": {
        "_delete_": True,
        "type": "FeatureBackbone",
        "task": "det",
        "out_indices": (1, 2, 3),
    }
}
