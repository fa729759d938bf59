# Cascade Mask R-CNN on dinat_base, COCO, 36 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     cascade_mask_rcnn_dinat_base_3x_coco
# Command, 1 GPU: vitarium train cascade_mask_rcnn_dinat_base_3x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 53.4, mask AP 46.2 (README of SHI-Labs/Neighborhood-Attention-Transformer,
#     d334f5b)
# Source: SHI-Labs/Neighborhood-Attention-Transformer d334f5b,
#     detection/configs/dinat/cascade_mask_rcnn_dinat_base_3x_coco.py
# Differs: mixed precision is torch's, theirs is of the parts that mmdet 2 marks
# Released detector: dinat_base.shi_cascade_mask_rcnn_3x_coco
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_instance_crops.py", "_base_/schedule_3x.py"]
model = {
    "backbone": {"name": "dinat_base", "pretrained": True, "drop_path_rate": 0.6},
    "neck": {"in_channels": [128, 256, 512, 1024]},
}
optim_wrapper = {
    "type": "AmpOptimWrapper",
    "loss_scale": 512.0,
    "optimizer": {"lr": 7.5e-05, "weight_decay": 0.05},
    "paramwise_cfg": {"custom_keys": {"rpb": {"decay_mult": 0.0}, "norm": {"decay_mult": 0.0}}},
}
