# Cascade Mask R-CNN on nat_base, COCO, 36 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     cascade_mask_rcnn_nat_base_3x_coco
# Command, 1 GPU: vitarium train cascade_mask_rcnn_nat_base_3x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 52.3, mask AP 45.1 (README of SHI-Labs/Neighborhood-Attention-Transformer,
#     d334f5b)
# Source: SHI-Labs/Neighborhood-Attention-Transformer d334f5b,
#     detection/configs/nat/cascade_mask_rcnn_nat_base_3x_coco.py
# Differs: mixed precision is torch's, theirs is of the parts that mmdet 2 marks
# Released detector: nat_base.shi_cascade_mask_rcnn_3x_coco
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_instance_crops.py", "_base_/schedule_3x.py"]
model = {
    "backbone": {"name": "nat_base", "pretrained": True, "drop_path_rate": 0.5},
    "neck": {"in_channels": [128, 256, 512, 1024]},
}
optim_wrapper = {
    "type": "AmpOptimWrapper",
    "loss_scale": 512.0,
    "optimizer": {"lr": 0.0001, "weight_decay": 0.05},
    "paramwise_cfg": {"custom_keys": {"rpb": {"decay_mult": 0.0}, "norm": {"decay_mult": 0.0}}},
}
