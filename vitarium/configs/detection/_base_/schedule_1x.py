# 12 epochs of mmdet's, with AdamW.
_base_ = [
    __import__("mmdet").__path__[0] + "/.mim/configs/_base_/schedules/schedule_1x.py",
    __import__("mmdet").__path__[0] + "/.mim/configs/_base_/default_runtime.py",
]
optim_wrapper = {
    "optimizer": {
        "_delete_": True,
        "type": "AdamW",
        "lr": 1e-4,
        "betas": (0.9, 0.999),
        "weight_decay": 0.05,
    }
}
