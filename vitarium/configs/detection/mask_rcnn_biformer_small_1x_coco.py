# Mask R-CNN on biformer_small, COCO, 12 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     mask_rcnn_biformer_small_1x_coco
# Command, 1 GPU: vitarium train mask_rcnn_biformer_small_1x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 47.8, mask AP 43.2 (README of rayleizhu/BiFormer, 1697bbb)
# Source: rayleizhu/BiFormer 1697bbb, object_detection/configs/coco/maskrcnn.1x.biformer_small.py
# Differs: mixed precision is torch's, theirs is of the parts that mmdet 2 marks
# Weights: from a browser, then vitarium download biformer_small --file FILE
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_instance.py", "_base_/schedule_1x.py"]
model = {
    "backbone": {
        "name": "biformer_small",
        "pretrained": True,
        "drop_path_rate": 0.2,
        "norm_eval": True,
    },
    "neck": {"in_channels": [64, 128, 256, 512]},
}
optim_wrapper = {
    "type": "AmpOptimWrapper",
    "loss_scale": 512.0,
    "optimizer": {"lr": 0.0001, "weight_decay": 0.05},
    "paramwise_cfg": {"custom_keys": {"norm": {"decay_mult": 0.0}}},
}
