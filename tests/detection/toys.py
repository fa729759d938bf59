"""A data set, a model and a measure that take milliseconds, for tests of everything around them."""

from __future__ import annotations

import random

import numpy as np
import torch
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from torch import nn
from torch.utils.data import Dataset


@DATASETS.register_module()
class ToyData(Dataset):
    """Rows of numbers, to which all three generators add; ``read`` tells which were read."""

    metainfo = {"classes": ("toy",)}  # noqa: RUF012
    read: list[int] = []  # noqa: RUF012

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def get_data_info(self, index):
        return {"width": 1 + index % 3, "height": 2}

    def __getitem__(self, index):
        self.read.append(index)
        noise = random.gauss(0, 0.1) + np.random.normal(0, 0.1) + 0.1 * torch.randn(3, 8, 8)
        return {"inputs": noise + index / self.size, "targets": torch.tensor(float(index % 3))}


@MODELS.register_module()
class ToyModel(BaseModel):
    """A batch norm, dropout, and as the loss how far the mean is from the target."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()
        )
        self.head = nn.Linear(144, 1)

    def forward(self, inputs, targets, mode="tensor"):
        out = self.head(self.body(torch.stack(inputs))).flatten()
        error = (out - torch.stack(targets)) ** 2
        return {"loss": error.mean()} if mode == "loss" else [{"error": x} for x in error]


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """Mean error, negated: more is better."""

    default_prefix = "toy"

    def process(self, data_batch, data_samples):
        self.results += [float(each["error"]) for each in data_samples]

    def compute_metrics(self, results):
        return {"accuracy": -sum(results) / len(results)}
