"""The configs of detectors that ship, shrunk to what one CPU trains in a second."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
from attos import ATTOS
from PIL import Image

from vitarium.data.digits import CLASSES
from vitarium.data.folders import SceneSet, ensure
from vitarium.tools import detection_recipes

RECIPES = [*detection_recipes.recipes()]
FILES = {recipe.name: detection_recipes.FOLDER / f"{recipe.name}.py" for recipe in RECIPES}
_FOLDER = Path(__file__).parent / "golden"
SMALLER = 8  # times: images, crops
REGIONS, CHANNELS = 32, 64  # at most


@cache
def _parsed(name):
    from mmengine.config import Config

    return Config.fromfile(FILES[name])


def parsed(name):
    """A config of one's own."""
    return deepcopy(_parsed(name))


def head_of(name):
    return max((x for x in detection_recipes.TITLES if name.startswith(x)), key=len)


def entry_of(name):
    recipe = next(x for x in RECIPES if x.name == name)
    return recipe.settings["model"]["backbone"]["name"].partition(".")[0]


def _goldens():
    """Entry -> the authors' description of their backbone in detection."""
    found = {}
    for index in sorted(_FOLDER.glob("*/index.json")):
        for case, row in json.loads(index.read_text()).items():
            if case.endswith("_det") and row.get("api") == "features":
                found[row["entry"]] = index.parent / f"{case}.json"
    return found


GOLDENS = _goldens()


def of_each(*parts):
    """The first recipe of each kind, of which ``head`` and ``family`` are told."""
    kinds = {}
    for name in FILES:
        kind = {"head": head_of(name), "family": detection_recipes.family_of(entry_of(name))}
        kinds.setdefault(tuple(kind[part] for part in parts), name)
    return [*kinds.values()]


def built(config, device="cpu"):
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger

    register_all_modules(init_default_scope=True)
    if not MMLogger.check_instance_created("quiet"):  # it lists every parameter else
        MMLogger.get_instance("quiet", log_level="ERROR")
    config.model.backbone.pretrained = False
    with torch.device(device):
        return MODELS.build(config.model)


def scenes(root):
    """Four digit scenes as a COCO data set."""
    return ensure("detection", root, SceneSet(train=2, val=2, size=(96, 128)))


def panoptic_scenes(root):
    """The same scenes with maps of segments: the digits as things, what is behind them as stuff."""
    from pycocotools import mask as run_lengths

    from vitarium.heads.mmdet.panoptic import id2rgb

    folder = scenes(root)
    for split in ("train", "val"):
        content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        maps = folder / "annotations" / f"panoptic_{split}"
        maps.mkdir(exist_ok=True)
        annotations = []
        for image in content["images"]:
            ids = np.ones((image["height"], image["width"]), np.int64)
            kinds = {1: len(CLASSES) + 1}
            for each in content["annotations"]:
                if each["image_id"] == image["id"]:
                    lengths = run_lengths.frPyObjects(each["segmentation"], *ids.shape)
                    kinds[len(kinds) + 1] = each["category_id"]
                    ids[run_lengths.decode(lengths) > 0] = len(kinds)
            Image.fromarray(id2rgb(ids)).save(maps / image["file_name"])
            segments = []
            for number, kind in kinds.items():
                rows, columns = np.nonzero(ids == number)
                left, top = int(columns.min()), int(rows.min())
                box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
                about = {"bbox": box, "area": len(rows), "iscrowd": 0}
                segments.append({"id": number, "category_id": kind, **about})
            annotations.append(
                {
                    "image_id": image["id"],
                    "file_name": image["file_name"],
                    "segments_info": segments,
                }
            )
        things = [{**each, "isthing": 1} for each in content["categories"]]
        stuff = {"id": len(things) + 1, "name": "background", "isthing": 0}
        content |= {"annotations": annotations, "categories": [*things, stuff]}
        path = folder / "annotations" / f"panoptic_{split}.json"
        path.write_text(json.dumps(content))
    return folder


def _panoptic(config, folder):
    """A panoptic config on `panoptic_scenes`, in place."""
    things, stuff = len(CLASSES), 1
    head = config.model.panoptic_head
    for part in (head, config.model.panoptic_fusion_head):
        part.update(num_things_classes=things, num_stuff_classes=stuff)
    head.loss_cls.class_weight = [1.0] * (things + stuff) + [0.1]
    classes = (*CLASSES, "background")
    meta = {
        "classes": classes,
        "thing_classes": classes[:things],
        "stuff_classes": classes[things:],
    }
    loaders = ((config.train_dataloader, "train"), (config.val_dataloader, "val"))
    for loader, split in (*loaders, (config.test_dataloader, "val")):
        loader.dataset.update(
            data_root=f"{folder}/",
            ann_file=f"annotations/panoptic_{split}.json",
            data_prefix={"img": f"{split}/", "seg": f"annotations/panoptic_{split}/"},
            metainfo=meta,
        )
        loader.update(batch_size=1, num_workers=0, persistent_workers=False)
    _smaller(config.val_dataloader.dataset.pipeline)
    _smaller(config.test_dataloader.dataset.pipeline)
    quality = {
        "type": "CocoPanopticMetric",
        "ann_file": f"{folder}/annotations/panoptic_val.json",
        "seg_prefix": f"{folder}/annotations/panoptic_val/",
    }
    config.val_evaluator = config.test_evaluator = quality


def shrunk(name, folder):
    """The config on the family's smallest model and on digit scenes, for a CPU."""
    config = parsed(name)
    backbone = config.model.backbone
    atto = max((x for x in ATTOS if backbone.name.startswith(x.removesuffix("_atto"))), key=len)
    channels = [x["num_chs"] for x in timm.create_model(atto, device="meta").feature_info]
    backbone.update(name=atto, drop_path_rate=0.1)
    indices = backbone.get("out_indices", range(4))
    taker = config.model.panoptic_head if "panoptic_head" in config.model else config.model.neck
    taker.in_channels = [channels[i] for i in indices]
    _smaller(config.train_dataloader.dataset.pipeline)
    _smaller(config.model.data_preprocessor.get("batch_augments", []))
    most = {"num_layers": 2, "fc_out_channels": CHANNELS, "num_points": 128}
    regions = ("num", "num_queries", "num_dn_queries", "nms_pre", "max_per_img")
    most |= dict.fromkeys(regions, REGIONS)
    if config.model.type in ("MaskRCNN", "CascadeRCNN", "RetinaNet"):
        widths = ("in_channels", "out_channels", "feat_channels", "conv_out_channels")
        most |= dict.fromkeys(widths, CHANNELS)
    _fewer(config.model, most)
    config.optim_wrapper.type = "OptimWrapper"
    config.optim_wrapper.pop("loss_scale", None)
    config.train_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    config.train_dataloader.dataset.update(
        data_root=f"{folder}/",
        ann_file="annotations/instances_train.json",
        data_prefix={"img": "train/"},
        metainfo={"classes": tuple(CLASSES)},
        serialize_data=False,  # which collects garbage
    )
    if name.endswith("_panoptic"):
        _panoptic(config, folder)
    return config


def _smaller(transforms):
    """Sizes in pixels, in place."""
    for each in transforms:
        if not isinstance(each, dict):
            _smaller(each)
            continue
        for key in ("scale", "crop_size", "size"):
            if key in each:
                each[key] = tuple(side // SMALLER for side in each[key])
        if "scales" in each:
            each["scales"] = [tuple(side // SMALLER for side in scale) for scale in each["scales"]]
        _smaller(each.get("transforms", []))


def _fewer(settings, most):
    """No number greater than what ``most`` has for its name, in place."""
    for key, value in settings.items():
        if key in most and isinstance(value, int):
            settings[key] = min(value, most[key])
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                _fewer(each, most)


def step(config):
    """One update: the losses, and the names of parameters without a gradient."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.runner import Runner

    torch.manual_seed(0)
    model = built(config).train()
    model.init_weights()
    loader = Runner.build_dataloader(config.train_dataloader, seed=0)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    data = model.data_preprocessor(next(iter(loader)), True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    total, losses = model.parse_losses(model(**data, mode="loss"))
    wrapper.backward(total)
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    wrapper.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    return losses, unused, still
