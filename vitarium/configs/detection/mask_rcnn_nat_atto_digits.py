# Mask R-CNN on nat_atto, from random weights, on scenes of handwritten digits.
#
# Command: vitarium train mask_rcnn_nat_atto_digits
# Hardware: two CPU cores; scenes are made on first use, in half a minute
# Expected result: box AP 0.621, mask AP 0.675 on scenes of held-out digits, in 372 seconds on two
#     cores, measured
# Source: vitarium
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = "_base_/mask_rcnn.py"

updates = 320
root = str(__import__("vitarium.data.folders", fromlist="*").ensure("detection"))
data = {
    "type": "CocoDataset",
    "metainfo": {"classes": tuple("0123456789")},
    "data_root": root,
    "test_mode": True,
}
image = {"type": "LoadImageFromFile"}
annotations = {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}
resize = {"type": "Resize", "scale": (160, 160), "keep_ratio": True}
pack = {"type": "PackDetInputs"}

model = {
    "data_preprocessor": {"mean": [127.5] * 3, "std": [127.5] * 3},
    "backbone": {"name": "nat_atto"},
    "neck": {"in_channels": [32, 64, 128, 256], "out_channels": 64},
    "rpn_head": {"in_channels": 64, "feat_channels": 64, "anchor_generator": {"scales": [4]}},
    "roi_head": {
        "bbox_roi_extractor": {"out_channels": 64},
        "bbox_head": {
            "in_channels": 64,
            "fc_out_channels": 256,
            "num_classes": 10,
            "reg_class_agnostic": True,
        },
        "mask_roi_extractor": {"out_channels": 64},
        "mask_head": {
            "num_convs": 2,
            "in_channels": 64,
            "conv_out_channels": 64,
            "num_classes": 10,
            "class_agnostic": True,
        },
    },
    "train_cfg": {
        "rpn": {"sampler": {"num": 128}},
        "rpn_proposal": {"nms_pre": 500, "max_per_img": 200},
        "rcnn": {"sampler": {"num": 128}},
    },
    "test_cfg": {"rpn": {"nms_pre": 500, "max_per_img": 200}},
}

train_dataloader = {
    "batch_size": 8,
    "num_workers": 0,
    "sampler": {"type": "InfiniteSampler", "shuffle": True},
    "dataset": {
        **data,
        "ann_file": "annotations/instances_train.json",
        "data_prefix": {"img": "train/"},
        "test_mode": False,
        "pipeline": [image, annotations, resize, pack],
    },
}
val_dataloader = test_dataloader = {
    "batch_size": 8,
    "num_workers": 0,
    "sampler": {"type": "DefaultSampler", "shuffle": False},
    "dataset": {
        **data,
        "ann_file": "annotations/instances_val.json",
        "data_prefix": {"img": "val/"},
        "pipeline": [image, resize, annotations, pack],
    },
}
val_evaluator = test_evaluator = {
    "type": "CocoMetric",
    "ann_file": root + "/annotations/instances_val.json",
    "metric": ["bbox", "segm"],
}

optim_wrapper = {
    "optimizer": {"type": "AdamW", "lr": 1.5e-3, "betas": (0.9, 0.99), "weight_decay": 0.05},
    "paramwise_cfg": {"custom_keys": {"rpb": {"decay_mult": 0.0}, "norm": {"decay_mult": 0.0}}},
    "clip_grad": {"max_norm": 10},
}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 50},
    {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 50, "end": updates},
]
train_cfg = {"type": "IterBasedTrainLoop", "max_iters": updates, "val_interval": updates}
val_cfg = {"type": "ValLoop"}
test_cfg = {"type": "TestLoop"}
default_scope = "mmdet"
default_hooks = {
    "logger": {"type": "LoggerHook", "interval": 20},
    "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 100},
}
log_processor = {"by_epoch": False}
