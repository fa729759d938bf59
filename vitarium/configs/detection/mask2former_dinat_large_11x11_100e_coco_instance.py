# Mask2Former on dinat_large_11x11, COCO, instance, 100 epochs: 16 images a step.
#
# Command, 8 GPUs: torchrun --nproc_per_node 8 -m vitarium_cli train \
#     mask2former_dinat_large_11x11_100e_coco_instance
# Command, 1 GPU: vitarium train mask2former_dinat_large_11x11_100e_coco_instance \
#     --set train_dataloader.batch_size=16
#
# Hardware: 8 GPUs; not run
# Expected result: AP 50.8 (README of SHI-Labs/Neighborhood-Attention-Transformer, d334f5b)
# Source: SHI-Labs/Neighborhood-Attention-Transformer d334f5b,
#     mask2former/configs/coco/instance-segmentation/dinat,
#     maskformer2_dinat_large_IN21k_384_bs16_100ep.yaml; mmdet 3.3.0, mask2former for data and
#     network
# Differs: the authors train with detectron2
# Released detector: dinat_large_11x11.shi_mask2former_coco_instance
custom_imports = {"imports": ["vitarium.heads.mmdet"]}
_base_ = ["_base_/mask2former_instance.py"]
model = {
    "backbone": {"name": "dinat_large_11x11.shi_in22k", "pretrained": True, "drop_path_rate": 0.3},
    "panoptic_head": {"in_channels": [192, 384, 768, 1536], "num_queries": 200},
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
param_scheduler = {"end": 737500, "milestones": [655556, 710184]}
train_cfg = {"max_iters": 737500, "dynamic_intervals": [(735001, 737500)]}
