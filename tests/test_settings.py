"""Which differences between two configurations count, and how they are told."""

import copy
from typing import Any

import pytest

from experiments import cli, settings
from experiments.run_directory import configuration
from experiments.train import train


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    line = "--model Fusion --data SyntheticMIMICIV --data.root nowhere --finetune SyntheticEICU --trainer.max_epochs 3"
    made = cli.configured("train", line.split())
    options = {name: made[name] for name in ("runs", "seed", "patience", "finetune_epochs", "checkpoint_minutes")}
    data = {name: made[name] for name in ("data", "finetune")}
    return configuration(made["model"], data, made["trainer"], **options)


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted key, or without the key where ``value`` is ``...``."""
    whole = copy.deepcopy(config)
    section = whole
    *path, last = key.split(".")
    for step in path:
        section = section[step]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return whole


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("seed", 1, "  --seed: 0 there, 1 here"),
        ("model.init_args.width", 32, "  --model.width: 64 there, 32 here"),
        ("model.init_args.pos_weight", 2.0, "  --model.pos_weight: none there, 2.0 here"),
        ("model.class_path", "ehrmodels.hymate.HyMaTE", "  --model: ehrmodels.fusion.Fusion there, ehrmodels.hymate.HyMaTE here"),
        ("data.init_args.sepsis", True, "  --data.sepsis: false there, true here"),
        ("finetune.init_args.hours", 12, "  --finetune.hours: 24 there, 12 here"),
        ("data.init_args.root", "elsewhere", "  --data.root: nowhere there, elsewhere here"),
        ("finetune_epochs", 3, "  --finetune_epochs: 10 there, 3 here"),
        ("trainer.callbacks", ["mine"], "  --trainer.callbacks: none there, ['mine'] here"),
        ("trainer.max_epochs", ..., "  --trainer.max_epochs: 3 there, 30 here"),
    ],
)  # fmt: skip
def test_what_counts(config: dict[str, Any], key: str, value: Any, text: str) -> None:
    unequal = settings.differences(config, changed(config, key, value), train)
    assert settings.as_flags(unequal) == text
    back = settings.differences(changed(config, key, value), config, train)
    assert back == {key: pair[::-1] for key, pair in unequal.items()}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("runs", "elsewhere"), ("name", "other"), ("wandb", "offline"), ("checkpoint_minutes", 1.0)],
        *[("data.init_args.num_workers", 4), ("finetune.init_args.cache", "c")],
        *[("trainer.detect_anomaly", True)],
        *[("model.class_path", "Fusion"), ("model.init_args.width", 64.0), ("trainer.max_epochs", 3.0)],
        # an option that a release has added, or one that is written out although it is the default
        *[("trainer.accumulate_grad_batches", 1), ("trainer.gradient_clip_val", ...), ("trainer.logger", None)],
        *[("patience", ...), ("model.init_args.fusion", ...), ("model.init_args.pos_weight", None)],
        *[("data.init_args.batch_size", ...), ("data.init_args.stays", None), ("data.init_args.statics", None)],
        ("trainer.an_option_of_another_release", None),
    ],
)
def test_what_does_not_count(config: dict[str, Any], key: str, value: Any) -> None:
    other = changed(config, key, value)
    assert settings.differences(config, other, train) == settings.differences(other, config, train) == {}


def test_options_of_another_class_are_not_listed_beside_it(config: dict[str, Any]) -> None:
    other = changed(config, "model", {"class_path": "HyMaTE", "init_args": {"state": 8, "width": 3}})
    assert set(settings.differences(config, other, train)) == {"model.class_path"}
    assert set(settings.differences(config, changed(config, "finetune", ...), train)) == {"finetune.class_path"}


def test_flat() -> None:
    nested = {"model": {"class_path": "Fusion", "init_args": {"width": 8}}, "seed": 0, "data": {}}
    assert settings.flat(nested) == {"model.class_path": "Fusion", "model.init_args.width": 8, "seed": 0, "data": {}}
