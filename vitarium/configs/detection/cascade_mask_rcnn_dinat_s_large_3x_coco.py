# Cascade Mask R-CNN on dinat_s_large, COCO, 36 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     cascade_mask_rcnn_dinat_s_large_3x_coco
# Command, 1 GPU: vitarium train cascade_mask_rcnn_dinat_s_large_3x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 54.8, mask AP 47.2 (README of SHI-Labs/Neighborhood-Attention-Transformer,
#     d334f5b)
# Source: SHI-Labs/Neighborhood-Attention-Transformer d334f5b,
#     detection/configs/dinat_s/cascade_mask_rcnn_dinat_s_large_3x_coco.py
# Differs: mixed precision is torch's, theirs is of the parts that mmdet 2 marks
# Released detector: dinat_s_large.shi_cascade_mask_rcnn_3x_coco
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_instance_crops.py", "_base_/schedule_3x.py"]
model = {
    "backbone": {"name": "dinat_s_large.shi_in22k", "pretrained": True, "drop_path_rate": 0.6},
    "neck": {"in_channels": [192, 384, 768, 1536]},
}
optim_wrapper = {
    "type": "AmpOptimWrapper",
    "loss_scale": 512.0,
    "optimizer": {"lr": 5e-05, "weight_decay": 0.05},
    "paramwise_cfg": {"custom_keys": {"rpb": {"decay_mult": 0.0}, "norm": {"decay_mult": 0.0}}},
}
