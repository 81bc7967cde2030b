"""Stays that go on: what is told of them equals what is told of the whole record, whatever the order, and after a restart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from datamodules.live import Live
from datamodules.module import Tables
from ehrmodels import load
from experiments.bedside import SCHEMA, Bedside
from experiments.cli import main
from experiments.evaluate import predict_split

MODELS = {
    "Fusion": "--model.width 8 --model.members 2 --trainer.max_epochs 1",
    "HyMaTE": "--model.width 8 --model.layers 1 --model.state 4 --trainer.max_epochs 1",
    "LightGBM": "--model.rounds 20",
}


@pytest.fixture(scope="module")
def tables(mimic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    main(f"prepare --data SyntheticMIMICIV --data.root {mimic} --out {folder}".split())
    return folder


@pytest.fixture(scope="module")
def checkpoints(mimic: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = tmp_path_factory.mktemp("runs")
    for name, options in MODELS.items():
        line = f"train --model {name} {options} --data SyntheticMIMICIV --data.root {mimic} --data.hours 12 --runs {runs} --name {name}"
        main(line.split())
    return {name: runs / name / "best.ckpt" for name in MODELS}


def records(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    return pl.read_parquet(folder / "stays.parquet").drop("excluded_by"), pl.read_parquet(folder / "events.parquet")


@pytest.mark.parametrize("name", MODELS)
def test_the_risk_of_a_stay_that_goes_on_is_that_of_its_whole_record(
    name: str, tables: Path, checkpoints: dict[str, Path]
) -> None:
    model, data = load(checkpoints[name]), Tables(str(tables))
    data.labelled = False
    data.serve(model)
    data.adopt(model.spec)
    data.prepare_data()
    data.setup()
    expected = predict_split(model, data, "all").head(25)
    stays, events = records(tables)
    bedside = Bedside(checkpoints[name])
    bedside.admit(stays)
    for stay, minute, probability in expected.select("stay_id", "minute", "probability").iter_rows():
        own = events.filter(stay_id=stay).sort("known_minute")
        half = own.filter(pl.col("known_minute") < minute // 2)
        for part in (half, own.filter(pl.col("known_minute") >= minute // 2)):
            if len(part):
                bedside.chart(part.sample(fraction=1, shuffle=True, seed=0))
            bedside.risk(stay, minute // 2)  # what was told before changes nothing
        assert bedside.risk(stay, minute) == pytest.approx(probability, abs=1e-5)
    reasons = bedside.reasons(stay, minute)
    assert 0 < len(reasons) <= 3 and {variable for variable, _ in reasons} <= set(model.spec.variables)


def files_of(folder: Path, tables: Path) -> None:
    """Six hours of four stays, a file an hour."""
    stays, events = records(tables)
    folder.mkdir()
    stays = stays.head(4)
    stays.write_parquet(folder / "stays.parquet")
    events = events.filter(pl.col("stay_id").is_in(stays["stay_id"].implode()), pl.col("known_minute") < 360)
    for hour, part in events.group_by(pl.col("known_minute").clip(0) // 60):
        part.write_parquet(folder / f"events-{hour[0]:02d}.parquet")


def test_a_folder_is_followed_and_a_restart_loses_nothing(
    tables: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    files_of(tmp_path / "ward", tables)
    line = f"predict --ckpt {checkpoints['Fusion']} --follow {tmp_path / 'ward'} --once true --out"
    main(f"{line} {tmp_path / 'whole.csv'}".split())
    whole = pl.read_csv(tmp_path / "whole.csv", schema=SCHEMA)
    assert whole["file"].n_unique() == 6 and whole["probability"].is_between(0, 1).all()
    assert whole["reasons"].str.contains(r"\w+ [+-]\d").any()
    text, rng = (tmp_path / "whole.csv").read_bytes(), np.random.default_rng(0)
    name = text.rindex(b"events-03") + 4  # killed in the name of a file of which it had told some stays
    for cut in (name, *rng.integers(text.index(b"\n") + 1, len(text), 3).tolist()):
        (tmp_path / "cut.csv").write_bytes(text[:cut])
        main(f"{line} {tmp_path / 'cut.csv'}".split())
        assert (tmp_path / "cut.csv").read_bytes() == text
    late = sorted((tmp_path / "ward").glob("events-*"))[3:]
    for path in late:
        path.rename(tmp_path / path.name)
    main(f"{line} {tmp_path / 'parts.csv'}".split())
    with (tmp_path / "parts.csv").open("a") as file:
        file.write("30000001,5")  # killed while it wrote
    for path in late:
        (tmp_path / path.name).rename(path)
    main(f"{line} {tmp_path / 'parts.csv'}".split())
    assert pl.read_csv(tmp_path / "parts.csv", schema=SCHEMA).equals(whole)


def test_what_cannot_be_charted_is_refused(
    tables: Path, checkpoints: dict[str, Path], tmp_path: Path, refused: Callable[[str], str]
) -> None:
    stays, events = records(tables)
    model = load(checkpoints["Fusion"])
    live = Live(model.spec, model.view, model.summary)
    live.admit(stays.head(2))

    def message(call: Callable[[Any], Any], table: Any) -> str:
        with pytest.raises(ValueError) as error:
            call(table)
        return str(error.value)

    assert "was admitted before" in message(live.admit, stays.head(1))
    stranger = events.filter(stay_id=stays["stay_id"][5])
    assert "which was not admitted" in message(live.chart, stranger)
    own = events.filter(stay_id=stays["stay_id"][0]).head(3)
    assert "column value is missing" in message(live.chart, own.drop("value"))
    assert "1 events have no minute" in message(live.chart, own.with_columns(minute=pl.Series([0, None, 5])))
    wrong = own.with_columns(concept=pl.lit("mood"))
    assert "mood is no concept" in message(live.chart, wrong)
    with pytest.raises(ValueError, match="stay 7 was not admitted"):
        live.batch(7, 60)
    live.discharge(stays["stay_id"][0])
    live.admit(stays.head(1))
    line = f"predict --ckpt {checkpoints['Fusion']} --out {tmp_path / 'risk.csv'}"
    assert "--once belongs to --follow" in refused(f"{line} --once true")
    assert "no folder" in refused(f"{line} --follow {tmp_path / 'nowhere'}")
