# Mask R-CNN: mmdet's, around a backbone of vitarium. All authors have these numbers.
# mmengine's "mmdet::" asks pkg_resources, which setuptools 82 dropped, so the folder is named here.
_base_ = __import__("mmdet").__path__[0] + "/.mim/configs/_base_/models/mask-rcnn_r50_fpn.py"
model = {"backbone": {"_delete_": True, "type": "FeatureBackbone", "task": "det"}}
