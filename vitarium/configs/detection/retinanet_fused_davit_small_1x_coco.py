# RetinaNet on fused_davit_small, COCO, 12 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     retinanet_fused_davit_small_1x_coco
# Command, 1 GPU: vitarium train retinanet_fused_davit_small_1x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 46.0 (README of dingmyu/davit, fc79470)
# Source: dingmyu/davit fc79470, mmdet/configs/davit_retinanet_1x_coco.py
# Differs: the authors' file is DaViT-Tiny's
# Released detector: fused_davit_small.dingmyu_retinanet_1x_coco
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/retinanet.py", "_base_/coco_detection_crops.py", "_base_/schedule_1x.py"]
model = {
    "backbone": {"name": "fused_davit_small", "pretrained": True, "drop_path_rate": 0.1},
    "neck": {"in_channels": [192, 384, 768]},
}
optim_wrapper = {"optimizer": {"lr": 0.0001, "weight_decay": 0.05}}
