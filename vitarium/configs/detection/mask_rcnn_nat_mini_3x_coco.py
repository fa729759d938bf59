# Mask R-CNN on nat_mini, COCO, 36 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     mask_rcnn_nat_mini_3x_coco
# Command, 1 GPU: vitarium train mask_rcnn_nat_mini_3x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 46.5, mask AP 41.7 (README of SHI-Labs/Neighborhood-Attention-Transformer,
#     d334f5b)
# Source: SHI-Labs/Neighborhood-Attention-Transformer d334f5b,
#     detection/configs/nat/mask_rcnn_nat_mini_3x_coco.py
# Differs: mixed precision is torch's, theirs is of the parts that mmdet 2 marks
# Released detector: nat_mini.shi_mask_rcnn_3x_coco
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_instance_crops.py", "_base_/schedule_3x.py"]
model = {
    "backbone": {"name": "nat_mini", "pretrained": True, "drop_path_rate": 0.2},
    "neck": {"in_channels": [64, 128, 256, 512]},
}
optim_wrapper = {
    "type": "AmpOptimWrapper",
    "loss_scale": 512.0,
    "optimizer": {"lr": 0.0001, "weight_decay": 0.05},
    "paramwise_cfg": {"custom_keys": {"rpb": {"decay_mult": 0.0}, "norm": {"decay_mult": 0.0}}},
}
