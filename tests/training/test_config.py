"""Configs: what they may say, what is wrong with them, and back to TOML."""

from __future__ import annotations

import pytest
import tomllib

from vitarium.training.toml import differences, dump_config, load_config, parse_config

LEAST = """
task = "classification"
[model]
name = "nat_atto"
[data]
source = "digits"
image_size = 64
[optimizer]
lr = 1e-3
[schedule]
epochs = 1
[train]
batch_size = 8
"""


def content(text=LEAST):
    return tomllib.loads(text)


def test_what_is_silent_has_a_default(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(LEAST)
    config = load_config(file)
    assert config.data.image_size == (64, 64)
    assert config.optimizer.name == "adamw"
    assert config.ema is None


def test_dumped_and_read_again_it_is_the_same(make_config):
    config = make_config(
        model__kwargs={"img_size": 32, "name of \u00e4 key": [1, 2.5, "a\x7fb"]},
        augment__mean=[0.5, 0.25, 0.125],
        augment__auto_augment="rand-m9-mstd0.5-inc1",
    )
    assert parse_config(tomllib.loads(dump_config(config)), "again") == config


def test_differences_have_dotted_names(make_config):
    found = differences(make_config(), make_config(optimizer__lr=2e-3, ema=None))
    assert found["optimizer.lr"] == (1e-3, 2e-3)
    assert {name.partition(".")[0] for name in found} == {"optimizer", "ema"}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.lr=0.5", ("optimizer", "lr"), 0.5),
        ("model.name=nat_mini", ("model", "name"), "nat_mini"),
        ("data.image_size=[32, 48]", ("data", "image_size"), (32, 48)),
        ("seed=3", ("seed",), 3),
        ("ema.decay=0.9", ("ema", "decay"), 0.9),
    ],
)
def test_overrides(tmp_path, override, path, value):
    file = tmp_path / "run.toml"
    file.write_text(LEAST)
    found = load_config(file, [override])
    for name in path:
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("optimizer", "learning_rate", 1, "unknown key optimizer.learning_rate"),
        ("optimizer", "weigth_decay", 0.1, "did you mean weight_decay"),
        ("train", "batch_size", "8", "train.batch_size: expected a whole number, got '8'"),
        ("train", "batch_size", 0, "train.batch_size: expected 1 or more, got 0"),
        ("train", "batch_size", True, "expected a whole number, got True"),
        ("train", "precision", "fp8", "expected one of fp32, bf16, fp16"),
        ("data", "image_size", [1, 2, 3], "expected 2 of a whole number"),
        ("schedule", "updates", 5, "expected epochs or updates"),
        ("schedule", "warmup_epochs", -1, "warm-up of 0 or more"),
        ("schedule", "cooldown_epochs", -1, "cooldown_epochs: expected 0 or more with cosine"),
        ("data", "repeats", 0, "data.repeats: expected 1 or more, got 0"),
        ("schedule", "power", 0.9, "expected a value with poly, else none"),
        ("optimizer", "lr", float("nan"), "expected a number"),
        ("augment", "scale", [0.1], "expected 2 of a number"),
        ("model", "checkpoint", 3, "expected a string"),
        ("head", "name", "upernet", "unknown key head"),
        ("ema", "decay", 1.5, "expected a share in"),
    ],
)
def test_what_is_wrong_is_named(section, key, value, message):
    wrong = content()
    wrong.setdefault(section, {})[key] = value
    with pytest.raises(ValueError, match=r"^here: ") as error:
        parse_config(wrong, "here")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("augment", "loss", "message"),
    [
        ({"auto_augment": "rand-m9", "color_jitter": 0.4}, {}, "color_jitter: expected 0 beside"),
        ({"crop": "resize", "interpolation": "random"}, {}, "interpolation: expected bilinear"),
        ({}, {"mixup": 0.8}, "train.batch_size: expected an even number with mixup"),
    ],
)
def test_what_would_be_ignored_is_refused(augment, loss, message):
    wrong = content() | {"augment": augment, "loss": loss}
    wrong["train"]["batch_size"] = 7
    with pytest.raises(ValueError, match=message):
        parse_config(wrong, "here")


@pytest.mark.parametrize(("key", "value"), [("cooldown_epochs", 5), ("warmup_prefix", True)])
def test_what_belongs_to_falling_rates_is_refused_without(key, value):
    wrong = content()
    wrong["schedule"] |= {"name": "constant", key: value}
    with pytest.raises(ValueError, match=f"schedule.{key}: expected .* cosine or poly"):
        parse_config(wrong, "here")


def test_what_is_missing_is_named():
    wrong = content()
    del wrong["optimizer"]["lr"]
    with pytest.raises(ValueError, match="here: optimizer.lr is missing"):
        parse_config(wrong, "here")
    with pytest.raises(ValueError, match="task: expected one of classification"):
        parse_config({**content(), "task": "detection"}, "here")


@pytest.mark.parametrize("text", ["task = ", "\x00"])
def test_what_is_no_toml_is_called_so(tmp_path, text):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match="no TOML"):
        load_config(file)


@pytest.mark.parametrize("override", ["lr", "=3", "optimizer.=3", "seed.x=3"])
def test_overrides_without_a_place_are_refused(tmp_path, override):
    file = tmp_path / "run.toml"
    file.write_text(LEAST.replace("task", "seed = 1\ntask"))
    with pytest.raises(ValueError, match="--set"):
        load_config(file, [override])
