# RetinaNet on dinat_s_tiny, COCO, 12 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     retinanet_dinat_s_tiny_1x_coco
# Command, 1 GPU: vitarium train retinanet_dinat_s_tiny_1x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: unknown, its authors publish none
# Source: mask_rcnn_dinat_s_tiny_3x_coco.py for the optimizer and the drop path; mmdet 3.3.0 for the
#     rest
# Differs: in nothing known
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/retinanet.py", "_base_/coco_detection_crops.py", "_base_/schedule_1x.py"]
model = {
    "backbone": {"name": "dinat_s_tiny", "pretrained": True, "drop_path_rate": 0.2},
    "neck": {"in_channels": [192, 384, 768]},
}
optim_wrapper = {
    "type": "AmpOptimWrapper",
    "loss_scale": 512.0,
    "optimizer": {"lr": 0.0001, "weight_decay": 0.05},
    "paramwise_cfg": {"custom_keys": {"rpb": {"decay_mult": 0.0}, "norm": {"decay_mult": 0.0}}},
}
