# Mask2Former, instance: mmdet's data, 50 epochs and network, around a backbone of vitarium.
_base_ = (
    __import__("mmdet").__path__[0]
    + "/.mim/configs/mask2former/mask2former_r50_8xb2-lsj-50e_coco.py"
)
model = {"backbone": {"_delete_": True, "type": "FeatureBackbone", "task": "det"}}
