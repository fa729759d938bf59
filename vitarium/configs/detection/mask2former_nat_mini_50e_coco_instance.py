# Mask2Former on nat_mini, COCO instances, 50 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     mask2former_nat_mini_50e_coco_instance
# Command, 1 GPU: vitarium train mask2former_nat_mini_50e_coco_instance \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: unknown, its authors publish none
# Source: mmdet 3.3.0, mask2former_r50_8xb2-lsj-50e_coco.py; mask_rcnn_nat_mini_3x_coco.py for the
#     drop path
# Differs: in nothing known
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/mask2former_instance.py"]
model = {
    "backbone": {"name": "nat_mini", "pretrained": True, "drop_path_rate": 0.2},
    "panoptic_head": {"in_channels": [64, 128, 256, 512]},
}
optim_wrapper = {
    "paramwise_cfg": {
        "custom_keys": {
            "attn.rpb": {"lr_mult": 0.1, "decay_mult": 0.0},
            "patch_embed.norm": {"lr_mult": 0.1, "decay_mult": 0.0},
            "downsample.norm": {"lr_mult": 0.1, "decay_mult": 0.0},
            "norm0.weight": {"lr_mult": 0.1, "decay_mult": 0.0},
            "norm0.bias": {"lr_mult": 0.1, "decay_mult": 0.0},
            "norm1.weight": {"lr_mult": 0.1, "decay_mult": 0.0},
            "norm1.bias": {"lr_mult": 0.1, "decay_mult": 0.0},
            "norm2.weight": {"lr_mult": 0.1, "decay_mult": 0.0},
            "norm2.bias": {"lr_mult": 0.1, "decay_mult": 0.0},
            "norm3.weight": {"lr_mult": 0.1, "decay_mult": 0.0},
            "norm3.bias": {"lr_mult": 0.1, "decay_mult": 0.0},
        },
    },
}
