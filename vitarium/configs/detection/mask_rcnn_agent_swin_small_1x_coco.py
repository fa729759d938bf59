# Mask R-CNN on agent_swin_small, COCO, 12 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     mask_rcnn_agent_swin_small_1x_coco
# Command, 1 GPU: vitarium train mask_rcnn_agent_swin_small_1x_coco \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: box AP 47.2, mask AP 42.7 (README of LeapLabTHU/Agent-Attention, 207ce3e)
# Source: LeapLabTHU/Agent-Attention 207ce3e,
#     downstream/detection/configs/agent_swin/agent_swin_s_mrcnn_1x_9-12-14-7.py
# Differs: 8 GPUs are assumed, their number is not stated
# Released detector: agent_swin_small.leaplab_mask_rcnn_1x_coco
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_instance_crops.py", "_base_/schedule_1x.py"]
model = {
    "backbone": {"name": "agent_swin_small", "pretrained": True, "drop_path_rate": 0.1},
    "neck": {"in_channels": [96, 192, 384, 768]},
}
optim_wrapper = {
    "optimizer": {"lr": 0.0001, "weight_decay": 0.05},
    "paramwise_cfg": {
        "custom_keys": {
            "relative_position_bias_table": {"decay_mult": 0.0},
            "norm": {"decay_mult": 0.0},
            "an_bias": {"decay_mult": 0.0},
            "na_bias": {"decay_mult": 0.0},
            "ah_bias": {"decay_mult": 0.0},
            "aw_bias": {"decay_mult": 0.0},
            "ha_bias": {"decay_mult": 0.0},
            "wa_bias": {"decay_mult": 0.0},
        },
    },
}
