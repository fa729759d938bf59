"""Configs of small detectors on the scenes, and of a toy."""

from pathlib import Path

_BACKBONE = """\
    data_preprocessor=dict(
        type="DetDataPreprocessor", mean=[124, 116, 104], std=[58, 57, 57], pad_size_divisor=32,
        pad_mask=MASKS,
    ),
    backbone=dict(type="FeatureBackbone", name="nat_atto", drop_path_rate=0.1),
    neck=dict(type="FPN", in_channels=[32, 64, 128, 256], out_channels=16, num_outs=4),"""

_RETINANET = """
model = dict(
    type="RetinaNet",
BACKBONE
    bbox_head=dict(
        type="RetinaHead", num_classes=10, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(
            type="AnchorGenerator", octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
            strides=[4, 8, 16, 32],
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
    ),
    train_cfg=dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
        sampler=dict(type="PseudoSampler"), allowed_border=-1, pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=100, score_thr=0.01, nms=dict(type="nms", iou_threshold=0.5), max_per_img=20
    ),
)
"""

_MASK_RCNN = """
proposals = dict(nms_pre=100, max_per_img=50, nms=dict(type="nms", iou_threshold=0.7),
                 min_bbox_size=0)
model = dict(
    type="MaskRCNN",
BACKBONE
    rpn_head=dict(
        type="RPNHead", in_channels=16, feat_channels=16,
        anchor_generator=dict(
            type="AnchorGenerator", scales=[4], ratios=[1.0], strides=[4, 8, 16, 32]
        ),
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(
            type="SingleRoIExtractor", out_channels=16, featmap_strides=[4, 8, 16],
            roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=2),
        ),
        bbox_head=dict(
            type="Shared2FCBBoxHead", in_channels=16, fc_out_channels=32, num_classes=10,
            reg_class_agnostic=True,
        ),
        mask_roi_extractor=dict(
            type="SingleRoIExtractor", out_channels=16, featmap_strides=[4, 8, 16],
            roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=2),
        ),
        mask_head=dict(
            type="FCNMaskHead", in_channels=16, num_convs=1, conv_out_channels=16, num_classes=10
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3),
            sampler=dict(
                type="RandomSampler", num=32, pos_fraction=0.5, add_gt_as_proposals=False
            ),
            allowed_border=-1,
            pos_weight=-1,
        ),
        rpn_proposal=proposals,
        rcnn=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
            sampler=dict(type="RandomSampler", num=32, pos_fraction=0.25), mask_size=28,
            pos_weight=-1,
        ),
    ),
    test_cfg=dict(
        rpn=proposals,
        rcnn=dict(
            score_thr=0.01, nms=dict(type="nms", iou_threshold=0.5), max_per_img=20,
            mask_thr_binary=0.5,
        ),
    ),
)
"""

_COMMON = """\
custom_imports = dict(imports=["vitarium.heads.mmdet"])
classes = tuple("0123456789")
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=MASKS),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset", data_root="ROOT", ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"), metainfo=dict(classes=classes),
        filter_cfg=dict(filter_empty_gt=True), pipeline=pipeline,
    ),
)
val_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset", data_root="ROOT", ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"), metainfo=dict(classes=classes), test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(
    type="CocoMetric", ann_file="ROOT/annotations/instances_val.json", metric="bbox"
)
test_dataloader, test_evaluator = val_dataloader, val_evaluator
val_cfg, test_cfg = dict(type="ValLoop"), dict(type="TestLoop")
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=1)
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3), clip_grad=dict(max_norm=5)
)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1), checkpoint=dict(type="CheckpointHook", interval=1)
)
randomness = dict(seed=3, deterministic=True)
"""


def detector(root: Path, masks: bool = False) -> str:
    """A Mask R-CNN's config or a RetinaNet's, with nat_atto, an epoch on the scenes in a folder."""
    text = _COMMON + (_MASK_RCNN if masks else _RETINANET).replace("BACKBONE", _BACKBONE)
    return text.replace("ROOT", str(root)).replace("MASKS", str(masks))


TOY = """
custom_imports = dict(imports=["toys"])
model = dict(type="ToyModel")
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="ToyData", size=9), collate_fn=dict(type="pseudo_collate"),
)
val_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="ToyData", size=4), collate_fn=dict(type="pseudo_collate"),
)
val_evaluator = dict(type="ToyMetric")
test_dataloader, test_evaluator = val_dataloader, val_evaluator
val_cfg, test_cfg = dict(), dict()
train_cfg = dict(by_epoch=True, max_epochs=3)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-2))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=4),
    dict(type="CosineAnnealingLR", T_max=3, by_epoch=True, convert_to_iter_based=True),
]
custom_hooks = [dict(type="EMAHook", momentum=0.1)]
default_hooks = dict(
    checkpoint=dict(type="CheckpointHook", interval=1, by_epoch=False, max_keep_ckpts=3,
                    save_best="toy/accuracy"),
    logger=dict(type="LoggerHook", interval=4),
)
randomness = dict(seed=3, deterministic=True)
"""
