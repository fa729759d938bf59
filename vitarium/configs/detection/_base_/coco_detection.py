# COCO: mmdet's, images of at most 800 x 1333 pixels.
_base_ = __import__("mmdet").__path__[0] + "/.mim/configs/_base_/datasets/coco_detection.py"
