# Cascade Mask R-CNN on agent_pvt_tiny, COCO, 36 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     cascade_mask_rcnn_agent_pvt_tiny_3x_coco
# Command, 1 GPU: vitarium train cascade_mask_rcnn_agent_pvt_tiny_3x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: unknown, its authors publish none
# Source: mask_rcnn_agent_pvt_tiny_1x_coco.py for the optimizer and the drop path; mmdet 3.3.0 for
#     the rest, Swin's authors for crops
# Differs: in nothing known
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_instance_crops.py", "_base_/schedule_3x.py"]
model = {
    "backbone": {"name": "agent_pvt_tiny", "pretrained": True, "drop_path_rate": 0.1},
    "neck": {"in_channels": [64, 128, 320, 512]},
}
optim_wrapper = {"optimizer": {"lr": 0.0002, "weight_decay": 0.0001}}
