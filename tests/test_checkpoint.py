"""Reading a checkpoint runs nothing but known models, and finds damage; a class of one's own trains, is scored and reloads."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn

from datamodules import SyntheticMIMICIV
from datamodules.contract import Grid, Spec
from ehrmodels import Fusion, ICUModule
from ehrmodels.checkpoint import load, read
from experiments.cli import main
from experiments.files import save
from experiments.train import train


class GRU(ICUModule):
    """A GRU over the hours.

    Args:
        width: Of its state.
        kwargs: As in ``ICUModule``.
    """

    view = "grid"

    def __init__(self, width: int = 8, **kwargs: Any):
        super().__init__(**kwargs)
        self.width = width

    def build(self, spec: Spec) -> None:
        self.gru = nn.GRU(3 * len(spec.variables), self.width, batch_first=True)
        self.head = nn.Linear(self.width, spec.outputs)

    def forward(self, batch: Grid) -> Tensor:
        _, last = self.gru(torch.cat([batch.value, batch.mask, batch.since], -1))
        return self.head(last[0]).squeeze(-1)


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    return read(trained / "best.ckpt"), tmp_path / "changed.ckpt"


@pytest.fixture
def bait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that must not be imported."""
    (tmp_path / "bait_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "bait_module"


@pytest.mark.parametrize("name", ["os.system", "ehrmodels.kernels._imported", "builtins.exec", "bait_module.Thing"])
def test_no_callable_of_a_checkpoint_is_called(
    name: str, checkpoint: tuple[dict[str, Any], Path], bait: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, path = checkpoint
    content["ehr"] |= {"model": name, "arguments": {"extension": bait, "interface": bait}}
    save(content, path)
    with pytest.raises(ValueError, match=r"is not one of this package .*--model"):
        load(path)
    assert bait not in sys.modules


@pytest.mark.parametrize("name", ["bait_module.Thing", "os.system", "Hospital", "ICUDataModule", "hospitals"])
def test_no_data_class_of_a_checkpoint_is_imported(
    name: str, checkpoint: tuple[dict[str, Any], Path], bait: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, path = checkpoint
    content["ehr"]["data"]["class"] = name
    save(content, path)
    with pytest.raises(SystemExit, match="2"):
        main(f"evaluate --ckpt {path} --out {tmp_path / 'o'}".split())
    assert f"was trained on {name}, which is none of EICU, MEDS, MIMICIV" in capsys.readouterr().err
    assert bait not in sys.modules


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda ehr: ehr["arguments"].update(gone=1),
            "Fusion has no argument gone; was it trained with another version",
        ),
        (lambda ehr: ehr["spec"].pop("scale"), r"not that of this version \(it lacks scale\)"),
        (lambda ehr: ehr.update(spec=[1]), "not that of this version"),
        (lambda ehr: ehr.update(model=3), "is not one of this package"),
    ],
)
def test_checkpoints_of_another_version_say_so(
    change: Any, words: str, checkpoint: tuple[dict[str, Any], Path]
) -> None:
    content, path = checkpoint
    change(content["ehr"])
    save(content, path)
    with pytest.raises(ValueError, match=words):
        load(path)


def test_a_checkpoint_without_data_asks_for_them(
    checkpoint: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, path = checkpoint
    del content["ehr"]["data"]
    save(content, path)
    with pytest.raises(SystemExit, match="2"):
        main(f"evaluate --ckpt {path} --out {tmp_path / 'o'}".split())
    assert "does not say which data it was trained on: give --data NAME --data.root FOLDER" in capsys.readouterr().err


def test_no_flipped_byte_goes_unnoticed(checkpoint: tuple[dict[str, Any], Path]) -> None:
    content, path = checkpoint
    save(content, path)
    whole, places = path.read_bytes(), random.Random(0)
    before = load(path).state_dict()
    for _ in range(80):
        damaged = bytearray(whole)
        damaged[places.randrange(len(damaged))] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        try:
            after = load(path).state_dict()
        except ValueError as error:
            assert str(path) in str(error)
            continue
        assert all(torch.equal(before[name], after[name]) for name in before)  # padding, or a date of the archive


def test_a_class_of_ones_own_trains_is_scored_and_reloads(mimic: Path, tmp_path: Path) -> None:
    data = SyntheticMIMICIV(str(mimic))
    results = train(GRU(), data, {"max_epochs": 1}, name="own", runs=str(tmp_path))
    assert results["SyntheticMIMICIV"]["n"] > 0
    path = tmp_path / "own" / "best.ckpt"
    assert type(load(path)) is type(load(path, GRU)) is type(GRU.load_from_checkpoint(path)) is GRU
    with pytest.raises(ValueError, match=r"holds a .*GRU, not a ehrmodels\.fusion\.Fusion"):
        Fusion.load_from_checkpoint(path)


def test_a_class_of_ones_own_on_the_command_line(
    mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[str], str]
) -> None:
    text = Path(__file__).read_text()
    (tmp_path / "mymodels.py").write_text(text[text.index("import random") : text.index("@pytest.fixture")])
    monkeypatch.chdir(tmp_path)  # whose modules can be named, without PYTHONPATH
    data = f"--data SyntheticMIMICIV --data.root {mimic}"
    main(f"train --model mymodels.GRU --model.width 4 {data} --trainer.max_epochs 1 --name own".split())
    main(["evaluate", "--ckpt", "runs/own/best.ckpt", "--model", "mymodels.GRU", "--out", "scores"])
    assert (tmp_path / "scores" / "report.html").exists()
    content = read("runs/own/best.ckpt")
    content["ehr"]["model"] = "yours.GRU"  # which nobody has imported
    save(content, Path("other.ckpt"))
    assert "name it with --model yours.GRU" in refused("evaluate --ckpt other.ckpt --out x")


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_every_checkpoint_has_a_threshold(name: str, trained: Path, tmp_path: Path) -> None:
    threshold = read(trained / name)["ehr"]["threshold"]
    assert 0 < threshold < 1
    main(f"predict --ckpt {trained / name} --out {tmp_path / 'r.csv'}".split())
    table = pl.read_csv(tmp_path / "r.csv")
    assert (table["alert"] == (table["probability"] >= threshold)).all() and table["alert"].any()
