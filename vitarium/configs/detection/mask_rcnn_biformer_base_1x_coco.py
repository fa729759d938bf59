# Mask R-CNN on biformer_base, COCO, 12 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     mask_rcnn_biformer_base_1x_coco
# Command, 1 GPU: vitarium train mask_rcnn_biformer_base_1x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 48.6, mask AP 43.7 (README of rayleizhu/BiFormer, 1697bbb)
# Source: rayleizhu/BiFormer 1697bbb, object_detection/configs/coco/maskrcnn.1x.biformer_base.py
# Differs: mixed precision is torch's, theirs is of the parts that mmdet 2 marks
# Weights: from a browser, then vitarium download biformer_base --file FILE
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_instance.py", "_base_/schedule_1x.py"]
model = {
    "backbone": {
        "name": "biformer_base",
        "pretrained": True,
        "drop_path_rate": 0.3,
        "norm_eval": True,
    },
    "neck": {"in_channels": [96, 192, 384, 768]},
}
optim_wrapper = {
    "type": "AmpOptimWrapper",
    "loss_scale": 512.0,
    "optimizer": {"lr": 0.0001, "weight_decay": 0.05},
    "paramwise_cfg": {"custom_keys": {"norm": {"decay_mult": 0.0}}},
}
