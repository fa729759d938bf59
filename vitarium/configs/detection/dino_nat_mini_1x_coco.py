# DINO with four scales on nat_mini, COCO, 12 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     dino_nat_mini_1x_coco
# Command, 1 GPU: vitarium train dino_nat_mini_1x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: unknown, its authors publish none
# Source: mmdet 3.3.0, dino-4scale_r50_8xb2-12e_coco.py; mask_rcnn_nat_mini_3x_coco.py for the drop
#     path
# Differs: in nothing known
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/dino.py"]
model = {
    "backbone": {"name": "nat_mini", "pretrained": True, "drop_path_rate": 0.2},
    "neck": {"in_channels": [128, 256, 512]},
}
