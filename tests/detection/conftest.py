"""Eight scenes, and configs whose detectors learn them in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitarium.data.folders import SceneSet, ensure

RETINANET = """
custom_imports = dict(imports=["vitarium.heads.mmdet"])
root = "{root}/"
classes = tuple("0123456789")
model = dict(
    type="RetinaNet",
    data_preprocessor=dict(
        type="DetDataPreprocessor", mean=[124, 116, 104], std=[58, 57, 57], pad_size_divisor=32
    ),
    backbone=dict(type="FeatureBackbone", name="nat_atto", drop_path_rate=0.1),
    neck=dict(
        type="FPN", in_channels=[32, 64, 128, 256], out_channels=16, start_level=1, num_outs=3
    ),
    bbox_head=dict(
        type="RetinaHead",
        num_classes=10,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        anchor_generator=dict(
            type="AnchorGenerator", octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
            strides=[8, 16, 32],
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
    ),
    train_cfg=dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
        sampler=dict(type="PseudoSampler"),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(nms_pre=100, score_thr=0.01, nms=dict(type="nms", iou_threshold=0.5),
                  max_per_img=20),
)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset", data_root=root, ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"), metainfo=dict(classes=classes),
        filter_cfg=dict(filter_empty_gt=True), pipeline=pipeline,
    ),
)
val_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset", data_root=root, ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"), metainfo=dict(classes=classes), test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(
    type="CocoMetric", ann_file=root + "annotations/instances_val.json", metric="bbox"
)
test_dataloader, test_evaluator = val_dataloader, val_evaluator
val_cfg, test_cfg = dict(type="ValLoop"), dict(type="TestLoop")
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=2)
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3), clip_grad=dict(max_norm=5)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=4),
    dict(type="CosineAnnealingLR", T_max=2, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1), checkpoint=dict(type="CheckpointHook", interval=1)
)
randomness = dict(seed=3, deterministic=True)
"""


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Eight scenes of 64 x 64 pixels to train on, and four to validate."""
    return ensure("detection", tmp_path_factory.mktemp("data"), SceneSet(8, 4, (64, 64)))


@pytest.fixture
def config(scenes, tmp_path) -> Path:
    """A RetinaNet with nat_atto: two epochs of four iterations."""
    path = tmp_path / "tiny.py"
    path.write_text(RETINANET.format(root=scenes))
    return path


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


@pytest.fixture
def toy(tmp_path) -> Path:
    """A toy's run: three epochs of five iterations, a checkpoint after each."""
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return path
