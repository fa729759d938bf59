# Mask R-CNN on fused_swin_tiny_patch4_window7_224, COCO, 36 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     mask_rcnn_fused_swin_tiny_patch4_window7_224_3x_coco
# Command, 1 GPU: vitarium train mask_rcnn_fused_swin_tiny_patch4_window7_224_3x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 46.0, mask AP 41.6 (README of
#     SwinTransformer/Swin-Transformer-Object-Detection, c7b2011)
# Source: SwinTransformer/Swin-Transformer-Object-Detection c7b2011,
#     configs/swin/mask_rcnn_swin_tiny_patch4_window7_mstrain_480-800_adamw_3x_coco.py
# Differs: mixed precision is torch's, theirs is apex'
# Released detector: fused_swin_tiny_patch4_window7_224.microsoft_mask_rcnn_3x_coco
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_instance_crops.py", "_base_/schedule_3x.py"]
model = {
    "backbone": {
        "name": "fused_swin_tiny_patch4_window7_224.microsoft_in1k",
        "pretrained": True,
        "drop_path_rate": 0.2,
    },
    "neck": {"in_channels": [96, 192, 384, 768]},
}
optim_wrapper = {
    "type": "AmpOptimWrapper",
    "loss_scale": "dynamic",
    "optimizer": {"lr": 0.0001, "weight_decay": 0.05},
    "paramwise_cfg": {
        "custom_keys": {
            "relative_position_bias_table": {"decay_mult": 0.0},
            "norm": {"decay_mult": 0.0},
        },
    },
}
