"""A detector and its config's own way of looking at an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmdet.registry
import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image

from vitarium.detection.checkpoints import located, read
from vitarium.detection.configs import load_config, without_pretrained
from vitarium.detection.pictures import Objects, class_names
from vitarium.heads.mmdet.released import load_detector


class Predictor:
    """Finds objects on images.

    Args:
        config: a config file, which is run.
        checkpoint: the detector's weights, of mmdet 2.x or 3: see `located`.
        device: of the model.
        overrides: see `load_config`.

    Attributes:
        names: of the classes: the checkpoint's, or the data set's, or else numbers.

    Raises:
        ValueError: the config cannot be run, or describes no detector.
        CheckpointError: the weights cannot be read, or are of another detector.
    """

    def __init__(
        self,
        config: Path,
        checkpoint: str,
        device: torch.device,
        overrides: Sequence[str] = (),
    ) -> None:
        settings = load_config(config, overrides)
        for key in ("model", "test_dataloader"):
            if settings.get(key) is None:
                raise ValueError(f"{config}: {key}: expected it for predictions, found none")
        without_pretrained(settings)
        held = read(located(checkpoint, "--checkpoint"))
        dataset = settings.test_dataloader.dataset
        with DefaultScope.overwrite_default_scope("mmdet"):
            self._model = mmdet.registry.MODELS.build(settings.model)
            self._pipeline = Compose(_without_files(dataset.pipeline))
        load_detector(self._model, held)
        self._model.to(device).eval()
        meta = held.get("meta") if "state_dict" in held else None
        known = (
            (meta or {}).get("dataset_meta"),
            dataset.get("metainfo"),
            getattr(mmdet.registry.DATASETS.get(dataset.type), "METAINFO", None),
        )
        self.names: tuple[str, ...] = next(filter(None, map(class_names, known)), ())

    def __call__(self, image: Image.Image, threshold: float) -> Objects:
        """What is found with at least a score.

        Raises:
            ValueError: the detector does not look for single objects.
        """
        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])  # mmcv's order: blue first
        data = self._pipeline({"img": pixels, "img_id": 0})
        batch = {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}
        with torch.inference_mode():
            (sample,) = self._model.test_step(batch)
        if "pred_instances" not in sample:
            raise ValueError(
                f"--config: expected a detector of objects, got one that gives "
                f"{', '.join(sample.keys())}"
            )
        return Objects.of(sample.pred_instances, threshold)


def _without_files(pipeline: Sequence[Any]) -> list[Any]:
    """A test's pipeline for an image that is there already, without annotations."""
    steps = [x for x in pipeline if not x["type"].rpartition(".")[2].startswith("Load")]
    return [{"type": "mmdet.LoadImageFromNDArray"}, *steps]
