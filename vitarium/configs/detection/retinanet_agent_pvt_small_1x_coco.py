# RetinaNet on agent_pvt_small, COCO, 12 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     retinanet_agent_pvt_small_1x_coco
# Command, 1 GPU: vitarium train retinanet_agent_pvt_small_1x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 44.1 (README of LeapLabTHU/Agent-Attention, 207ce3e)
# Source: LeapLabTHU/Agent-Attention 207ce3e,
#     downstream/detection/configs/agent_pvt/agent_pvt_s_rtn_1x_12-16-28-28.py
# Differs: 8 GPUs are assumed, their number is not stated
# Released detector: agent_pvt_small.leaplab_retinanet_1x_coco
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/retinanet.py", "_base_/coco_detection.py", "_base_/schedule_1x.py"]
model = {
    "backbone": {"name": "agent_pvt_small", "pretrained": True, "drop_path_rate": 0.1},
    "neck": {"in_channels": [128, 320, 512]},
}
optim_wrapper = {"optimizer": {"lr": 0.0001, "weight_decay": 0.0001}}
