# Mask R-CNN on fused_davit_small, COCO, 36 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     mask_rcnn_fused_davit_small_3x_coco
# Command, 1 GPU: vitarium train mask_rcnn_fused_davit_small_3x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 49.5, mask AP 44.3 (README of dingmyu/davit, fc79470)
# Source: dingmyu/davit fc79470, mmdet/configs/davit_maskrcnn_3x_coco.py
# Differs: the authors' file is DaViT-Tiny's
# Released detector: fused_davit_small.dingmyu_mask_rcnn_3x_coco
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_instance_crops.py", "_base_/schedule_3x.py"]
model = {
    "backbone": {"name": "fused_davit_small", "pretrained": True, "drop_path_rate": 0.2},
    "neck": {"in_channels": [96, 192, 384, 768]},
}
optim_wrapper = {"optimizer": {"lr": 0.0001, "weight_decay": 0.05}}
