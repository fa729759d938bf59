"""Train and test detectors from mmdet's Python configs, on mmengine's Runner."""
