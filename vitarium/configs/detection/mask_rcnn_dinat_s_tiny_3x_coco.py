# Mask R-CNN on dinat_s_tiny, COCO, 36 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     mask_rcnn_dinat_s_tiny_3x_coco
# Command, 1 GPU: vitarium train mask_rcnn_dinat_s_tiny_3x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 46.6, mask AP 42.1 (README of SHI-Labs/Neighborhood-Attention-Transformer,
#     d334f5b)
# Source: SHI-Labs/Neighborhood-Attention-Transformer d334f5b,
#     detection/configs/dinat_s/mask_rcnn_dinat_s_tiny_3x_coco.py
# Differs: mixed precision is torch's, theirs is of the parts that mmdet 2 marks
# Released detector: dinat_s_tiny.shi_mask_rcnn_3x_coco
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_instance_crops.py", "_base_/schedule_3x.py"]
model = {
    "backbone": {"name": "dinat_s_tiny", "pretrained": True, "drop_path_rate": 0.2},
    "neck": {"in_channels": [96, 192, 384, 768]},
}
optim_wrapper = {
    "type": "AmpOptimWrapper",
    "loss_scale": 512.0,
    "optimizer": {"lr": 0.0001, "weight_decay": 0.05},
    "paramwise_cfg": {"custom_keys": {"rpb": {"decay_mult": 0.0}, "norm": {"decay_mult": 0.0}}},
}
