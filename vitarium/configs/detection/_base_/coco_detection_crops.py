# COCO with the augmentation that DETR began with: images of 480 to 800 pixels, or a part of such.
_base_ = "coco_detection.py"
sizes = {
    "type": "RandomChoiceResize",
    "scales": [(side, 1333) for side in range(480, 801, 32)],
    "keep_ratio": True,
}
train_pipeline = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "with_bbox": True},
    {"type": "RandomFlip", "prob": 0.5},
    {
        "type": "RandomChoice",
        "transforms": [
            [sizes],
            [
                {
                    "type": "RandomChoiceResize",
                    "scales": [(400, 1333), (500, 1333), (600, 1333)],
                    "keep_ratio": True,
                },
                {
                    "type": "RandomCrop",
                    "crop_type": "absolute_range",
                    "crop_size": (384, 600),
                    "allow_negative_crop": True,
                },
                sizes,
            ],
        ],
    },
    {"type": "PackDetInputs"},
]
train_dataloader = {"dataset": {"pipeline": train_pipeline}}
