# Cascade Mask R-CNN: mmdet's with the box heads that Swin's authors and all after them have: four
# convolutions and one linear layer, batch norm over all GPUs, GIoU of decoded boxes.
_base_ = (
    __import__("mmdet").__path__[0] + "/.mim/configs/_base_/models/cascade-mask-rcnn_r50_fpn.py"
)
model = {
    "backbone": {"_delete_": True, "type": "FeatureBackbone", "task": "det"},
    "roi_head": {
        "bbox_head": [
            {
                "type": "ConvFCBBoxHead",
                "num_shared_convs": 4,
                "num_shared_fcs": 1,
                "in_channels": 256,
                "conv_out_channels": 256,
                "fc_out_channels": 1024,
                "roi_feat_size": 7,
                "num_classes": 80,
                "norm_cfg": {"type": "SyncBN", "requires_grad": True},
                "reg_class_agnostic": False,
                "reg_decoded_bbox": True,
                "bbox_coder": {
                    "type": "DeltaXYWHBBoxCoder",
                    "target_means": [0.0, 0.0, 0.0, 0.0],
                    "target_stds": stds,
                },
                "loss_cls": {"type": "CrossEntropyLoss", "loss_weight": 1.0},
                "loss_bbox": {"type": "GIoULoss", "loss_weight": 10.0},
            }
            for stds in (
                [0.1, 0.1, 0.2, 0.2],
                [0.05, 0.05, 0.1, 0.1],
                [0.033, 0.033, 0.067, 0.067],
            )
        ]
    },
}
