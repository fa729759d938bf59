# 36 epochs.
_base_ = "schedule_1x.py"
train_cfg = {"max_epochs": 36}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 500},
    {
        "type": "MultiStepLR",
        "by_epoch": True,
        "begin": 0,
        "end": 36,
        "milestones": [27, 33],
        "gamma": 0.1,
    },
]
