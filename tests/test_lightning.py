"""Models and data under a plain ``lightning.Trainer``, LightningCLI, and the trainer's own arguments under ``ehr train``."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

from datamodules import SyntheticEICU, SyntheticMIMICIV
from datamodules.module import ICUDataModule
from ehrmodels import Fusion, HyMaTE, HyMaTEForecast, ICUModule
from experiments.cli import main

CONFIGS = sorted((Path(__file__).parents[1] / "experiments" / "configs").glob("[!b]*.yaml"))  # but benchmarks
MAKE: dict[str, Any] = {
    "Fusion": lambda: Fusion(width=8),
    **{
        f"HyMaTE {a}": lambda a=a: HyMaTE(width=8, layers=1, state=4, heads=2, attention=a)
        for a in ("token", "variable", "channel")
    },
}
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, which is the user's to take


def trainer(**arguments: Any) -> lightning.Trainer:
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(**{**plain, "max_epochs": 1, **arguments})


def probabilities(model: ICUModule, data: ICUDataModule) -> dict[int, float]:
    parts = trainer().predict(model, data)
    rows, values = (torch.cat(p) for p in zip(*parts, strict=True))
    return dict(zip(data.samples["stay_id"].gather(rows.numpy()), values.tolist(), strict=True))


@pytest.mark.parametrize("name", MAKE)
def test_five_lines_are_enough(name: str, mimic: Path, eicu: Path, tmp_path: Path) -> None:
    data, model, fitting = SyntheticMIMICIV(str(mimic)), MAKE[name](), trainer(default_root_dir=tmp_path)
    fitting.fit(model, data)
    (validated,) = fitting.validate(model, data, verbose=False)
    (tested,) = fitting.test(model, data, verbose=False)
    assert set(validated) == {"val_loss", "val_auroc", "val_auprc", "val_auroc_auprc"}
    assert set(tested) == {name.replace("val", "test") for name in validated}
    path = tmp_path / "model.ckpt"
    fitting.save_checkpoint(path)
    again = type(model).load_from_checkpoint(path)
    assert again.threshold == model.threshold is not None
    assert trainer().test(again, SyntheticMIMICIV(str(mimic)), verbose=False) == [tested]
    assert trainer().test(MAKE[name](), SyntheticMIMICIV(str(mimic)), ckpt_path=path, verbose=False) == [tested]
    target = SyntheticEICU(str(eicu))
    trainer().test(again, target, verbose=False)
    assert target.spec == again.spec == data.spec


def test_a_loaded_model_brings_its_scaler(mimic: Path, tmp_path: Path) -> None:
    data, fitting = SyntheticMIMICIV(str(mimic), split="all"), trainer(default_root_dir=tmp_path)
    fitting.fit(Fusion(width=8), data)
    fitting.save_checkpoint(tmp_path / "m.ckpt")
    model = Fusion.load_from_checkpoint(tmp_path / "m.ckpt")
    before = probabilities(model, data)
    older = SyntheticMIMICIV(str(mimic), split="all", min_age=65)
    older.setup()  # which fits a scaler of its own
    assert older.spec != model.spec
    after = probabilities(model, older)
    assert 20 < len(after) < len(before)
    assert all(after[stay] == pytest.approx(before[stay], abs=1e-6) for stay in after)


def test_a_checkpoint_of_a_plain_trainer_is_evaluated_by_name_alone(mimic: Path, tmp_path: Path) -> None:
    fitting = trainer(default_root_dir=tmp_path)
    fitting.fit(Fusion(width=8), SyntheticMIMICIV(str(mimic)))
    fitting.save_checkpoint(tmp_path / "m.ckpt")
    main(f"evaluate --ckpt {tmp_path / 'm.ckpt'} --out {tmp_path / 'scores'}".split())
    assert (tmp_path / "scores" / "report.html").exists()


def test_forecasting_needs_nothing_else(mimic: Path, tmp_path: Path) -> None:
    fitting = trainer(default_root_dir=tmp_path)
    fitting.fit(HyMaTEForecast(width=8, layers=1, state=4, heads=2), SyntheticMIMICIV(str(mimic)))
    assert set(fitting.callback_metrics) == {"train_loss", "val_loss"}


def test_a_model_without_data_says_what_it_needs() -> None:
    loader = torch.utils.data.DataLoader([torch.zeros(1)])
    with pytest.raises(
        ValueError, match=r"Fusion has no layers yet: give the trainer a data module .* model\.initialise"
    ):
        trainer().fit(Fusion(), loader)


OURS = {"space", "teacher", "operating_point"}  # what LightningCLI has no word for


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if not OURS & set(yaml.safe_load(p.read_text()))], ids=lambda p: p.stem
)
def test_lightning_cli_reads_every_configuration(path: Path) -> None:
    cli = LightningCLI(
        ICUModule, ICUDataModule, subclass_mode_model=True, subclass_mode_data=True, run=False,
        args=["--config", str(path)], save_config_callback=None,
    )  # fmt: skip
    written = yaml.safe_load(path.read_text())
    assert type(cli.model).__name__ == written["model"]["class_path"]
    assert type(cli.datamodule).__name__ == written["data"]["class_path"]
    for name, value in written["model"].get("init_args", {}).items():
        assert cli.model.hparams[name] == value
    if "trainer" in written:
        assert cli.trainer.max_epochs == written["trainer"]["max_epochs"]


class Count(Callback):
    """Counts epochs, in a class variable since ``ehr`` makes the object."""

    epochs = 0

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        type(self).epochs += 1


def test_loggers_and_callbacks_of_the_trainer_are_obeyed(mimic: Path, tmp_path: Path) -> None:
    config = {
        "model": {"class_path": "Fusion", "init_args": {"width": 8}},
        "data": {"class_path": "SyntheticMIMICIV", "init_args": {"root": str(mimic)}},
        "trainer": {
            "max_epochs": 8,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs")}},
            "callbacks": [
                {"class_path": f"{__name__}.Count"},
                {
                    "class_path": "EarlyStopping",
                    "init_args": {"monitor": "val_loss", "mode": "max", "stopping_threshold": 0.0},
                },
            ],
        },
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    Count.epochs = 0
    main(f"train -c {tmp_path / 'own.yaml'} --runs {tmp_path} --model.learning_rate 0.01".split())
    assert (tmp_path / "own" / "best.ckpt").exists(), "the run is named after the file"
    assert Count.epochs == 1, "the user's early stopping stopped it, not ours"
    (log,) = (tmp_path / "logs").rglob("metrics.csv")
    assert "val_auroc" in log.read_text()
    stored = yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())["trainer"]
    assert stored["logger"]["init_args"]["save_dir"] == str(tmp_path / "logs") and len(stored["callbacks"]) == 2


def test_objects_are_taken_in_python(mimic: Path, tmp_path: Path) -> None:
    from experiments.train import train

    Count.epochs = 0
    arguments = {"max_epochs": 1, "callbacks": [Count()], "logger": CSVLogger(tmp_path / "logs")}
    results = train(Fusion(width=8), SyntheticMIMICIV(str(mimic)), arguments, name="own", runs=str(tmp_path))
    assert Count.epochs == 1 and list((tmp_path / "logs").rglob("metrics.csv"))
    assert results["SyntheticMIMICIV"]["auroc"]["value"] is not None


@pytest.mark.parametrize("flag", ["--trainer.logger", "--trainer.callbacks"])
def test_a_logger_that_is_not_there_is_a_message(
    flag: str, mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(
            f"train --model Fusion --data SyntheticMIMICIV --data.root {mimic} --runs {tmp_path} {flag} no.Thing".split()
        )
    assert f"{flag} no.Thing: expected the name of a {flag[10:].rstrip('s')}" in capsys.readouterr().err
