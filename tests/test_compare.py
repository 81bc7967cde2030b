"""``ehr compare``: against scores of each run alone, a bootstrap written out, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from experiments import metrics
from experiments.cli import main
from experiments.compare import Run, by_configuration, compare

SEPSIS = metrics.CHALLENGE
CONFIG: dict[str, Any] = {
    "model": {"class_path": "ehrmodels.fusion.Fusion", "init_args": {"width": 64}},
    "data": {"class_path": "datamodules.PhysioNet2012", "init_args": {"root": "there", "sets": "b,c"}},
    "trainer": {"devices": 1, "max_epochs": 3},
}


def patients(count: int, hours: int = 1, seed: int = 0) -> pl.DataFrame:
    """A predictions table without predictions: two thirds of the patients are in val, the others in test."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(count), hours)
    hour = np.tile(np.arange(1, hours + 1), count)
    onset = np.where(rng.random(count) < 0.4, rng.integers(1, hours + 1, count), hours + 1)[patient]
    return pl.DataFrame({
        "stay_id": patient + 10,
        "patient_id": patient.astype(str),
        "minute": (60 * hour).astype(np.int32),
        "target": (hour >= onset).astype(float),
        "split": np.where(patient % 3, "val", "test"),
    })  # fmt: skip


def written(
    folder: Path,
    rows: pl.DataFrame,
    seed: int,
    noise: float = 1.0,
    task: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    """A run directory with predictions of the rows: noisy ones, whose noise is that of ``seed``."""
    folder.mkdir(parents=True)
    logit = 2 * rows["target"].to_numpy() - 1 + noise * np.random.default_rng(seed + 100).normal(size=len(rows))
    table = rows.with_columns(probability=1 / (1 + np.exp(-logit)))
    table.select("stay_id", "patient_id", "minute", "target", "probability", "split").write_parquet(
        folder / "predictions.parquet"
    )
    threshold = metrics.choose_threshold(table.filter(split="val"))
    parts = {s: table.filter(split=s) for s in ("val", "test")}
    result = {s: metrics.score(part, threshold, 0, task) for s, part in parts.items() if len(part)}
    (folder / "metrics.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": seed, "name": folder.name, **options}))
    return str(folder)


@pytest.fixture
def four(tmp_path: Path) -> list[str]:
    """Three seeds of a model and one of another on 300 patients."""
    rows = patients(300)
    runs = [written(tmp_path / f"a{seed}", rows, seed) for seed in range(3)]
    return [*runs, written(tmp_path / "b0", rows, 7, 3.0, patience=4)]


def test_a_group_is_the_mean_of_its_seeds(four: list[str], tmp_path: Path) -> None:
    table = compare(four, str(tmp_path / "out"), reference=four[3])
    assert table["model"].to_list() == ["a0", "b0"] and table["seeds"].to_list() == ["0, 1, 2", "7"]
    tests = [pl.read_parquet(Path(run) / "predictions.parquet").filter(split="test") for run in four]
    for name in ("auroc", "auprc"):
        alone = [metrics.score(t, None, 0)[name]["value"] for t in tests]
        assert table[name].to_list() == pytest.approx([np.mean(alone[:3]), alone[3]])
        assert table[f"{name}_sd"][0] == pytest.approx(np.std(alone[:3], ddof=1))
        assert table[f"{name}_difference"].to_list() == [pytest.approx(np.mean(alone[:3]) - alone[3]), None]
    test = metrics.delong(tests[3:], tests[:3])
    assert [table["auroc_difference_low"][0], table["auroc_p"][0]] == [test["low"], test["p"]]
    assert set(table["auroc_test"]) == {"DeLong"}
    assert pl.read_csv(tmp_path / "out" / "compare.csv")["auprc_difference_low"][0] == table["auprc_difference_low"][0]
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000


def test_differences_of_groups_equal_a_loop_that_draws_patients(tmp_path: Path) -> None:
    rows = patients(150, hours=4).with_columns(split=pl.lit("test"))
    runs = [
        written(tmp_path / name, rows, seed, noise, patience=p)
        for name, seed, noise, p in (("a", 0, 1, 2), ("b", 1, 1, 2), ("c", 2, 3, 5))
    ]
    record = compare(runs, reference=runs[2]).row(0, named=True)
    assert record["seeds"] == "0, 1" and record["auroc_test"] == "bootstrap by patient" and record["auroc_p"] is None
    tables = [pl.read_parquet(Path(run) / "predictions.parquet") for run in runs]
    p = [t["probability"].to_numpy().reshape(150, 4) for t in tables]
    y = tables[0]["target"].to_numpy().reshape(150, 4)

    def auroc(target: np.ndarray, score: np.ndarray) -> float:
        return float(np.mean(np.sign(score[target == 1][:, None] - score[target == 0]) + 1) / 2)

    rng, drawn = np.random.default_rng(9), []
    for _ in range(300):
        chosen = rng.integers(150, size=150)
        one, two, three = (auroc(y[chosen].ravel(), score[chosen].ravel()) for score in p)
        drawn.append((one + two) / 2 - three)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert record["auroc_difference_low"] == pytest.approx(low, abs=0.15 * (high - low))
    assert record["auroc_difference_high"] == pytest.approx(high, abs=0.15 * (high - low))


def test_what_is_printed_fits_eighty_columns(
    four: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.files import console

    monkeypatch.setattr(console, "_width", 80)
    main(["compare", *four, "--split", "val"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "val split: n = 200" in text and "AUROC less a0" in text and "DeLong" in text
    assert text.count(" *") >= 2  # the other model is worse by both, and the legend


def test_utility_is_compared_where_all_have_it(tmp_path: Path) -> None:
    rows = patients(120, hours=12)
    runs = [written(tmp_path / f"u{seed}", rows, seed, 1 + 2 * seed, SEPSIS) for seed in range(2)]
    for folder in (tmp_path / "u0", tmp_path / "u1"):
        (folder / "config.yaml").unlink()
    table = compare(runs)
    for run, value in zip(runs, table["utility"], strict=True):
        assert value == pytest.approx(json.loads((Path(run) / "metrics.json").read_text())["test"]["utility"]["value"])
    assert table["utility_difference_high"][1] < 0
    assert "utility" not in compare([*runs, written(tmp_path / "without", rows, 3)]).columns


@pytest.mark.parametrize("how", ["rank", "logit"])
def test_a_blend_is_a_row_and_a_folder_to_compare(how: Any, four: list[str], tmp_path: Path) -> None:
    table = compare(four, str(tmp_path / "out"), blend=how)
    assert table["model"].to_list() == ["a0", "b0", f"blend ({how})"]
    tests = [pl.read_parquet(Path(run) / "predictions.parquet").filter(split="test") for run in four]
    if how == "logit":
        mean = 1 / (1 + np.exp(-np.mean([np.log(t["probability"] / (1 - t["probability"])) for t in tests], axis=0)))
    else:
        mean = np.mean([(t["probability"].rank() - 0.5) / len(t) for t in tests], axis=0)
    keys = tests[0].with_columns(mean=mean).select("stay_id", "mean")
    blend = pl.read_parquet(tmp_path / "out" / "blend" / "predictions.parquet")
    both = blend.filter(split="test").join(keys, on="stay_id")
    assert len(both) == 100 and both["probability"].to_list() == pytest.approx(both["mean"].to_list())
    again = compare([str(tmp_path / "out" / "blend"), four[0]])
    assert again["auroc"][0] == table["auroc"][2]
    threshold = json.loads((tmp_path / "out" / "blend" / "metrics.json").read_text())["threshold"]
    assert threshold == metrics.choose_threshold(blend.filter(split="val"))


def test_seeds_of_one_configuration_and_nothing_else_are_grouped(tmp_path: Path) -> None:
    rows = patients(30)
    wider = {"model": {"class_path": "ehrmodels.Fusion", "init_args": {"width": 32}}}
    runs = {
        "a": written(tmp_path / "a", rows, 0),
        "moved": written(tmp_path / "moved", rows, 1, checkpoint_minutes=3.0, patience=10),
        "wide": written(tmp_path / "wide", rows, 0, **wider),
        "again": written(tmp_path / "again", rows, 0),  # the seed of a: no further seed
        "wide2": written(tmp_path / "wide2", rows, 2, **wider),
    }
    for k, name in enumerate(("scored-a", "scored-moved")):  # folders of ``ehr evaluate``
        folder = tmp_path / name
        folder.mkdir()
        (folder / "predictions.parquet").write_bytes((tmp_path / "a" / "predictions.parquet").read_bytes())
        result = json.loads((tmp_path / "a" / "metrics.json").read_text())["test"]
        (folder / "metrics.json").write_text(
            json.dumps({**result, "checkpoint": str(tmp_path / ["a", "moved"][k] / "best.ckpt")})
        )
        runs[name] = str(folder)
    groups = by_configuration([Run.read(run) for run in runs.values()])
    names = {name: [Path(run.name).name for run in group] for name, group in groups.items()}
    assert names == {
        "a": ["a", "moved"],
        "wide": ["wide", "wide2"],
        "again": ["again"],
        "scored-a": ["scored-a", "scored-moved"],
    }


def test_what_is_refused(four: list[str], tmp_path: Path, refused: Callable[[str], str]) -> None:
    a, b = four[0], four[3]
    other = written(tmp_path / "other", patients(200), 0)
    labels = written(tmp_path / "labels", patients(300).with_columns(target=1 - pl.col("target")), 0)
    val = written(tmp_path / "val", patients(300).filter(split="val"), 0)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("seed: 0\n")
    for line, words in {
        f"{a}": "expected at least two runs to compare, found 1",
        "--split val": "no RUN is named: expected ehr compare RUN RUN",
        f"{a} --split val {b}": "stands apart: name every RUN in one place",
        f"{a} {a}/": "is named twice",
        f"{a} {tmp_path}": "found none; name another folder",
        f"{a} {tmp_path / 'begun'}": "a run that has not ended: finish it with --resume",
        f"{a} {b} --reference {other}": "is none of the runs",
        f"{a} {b} --blend rank": "give it a folder with --out",
        f"{a} {b} --blend mean": "--blend: expected rank, logit, found mean",
        f"{a} {b} --split all": "is a training run, whose val rows chose its model",
        f"{a} {val}": f"{val} has no predictions of split test: found val; give --split val",
        f"{a} {other}": "were not scored on the same samples: 100 and 67 of split test, 67 of them in both",
        f"{a} {labels}": "give 100 of 100 samples another outcome",
        f"{a} {b} --lr 1": "unknown option --lr",
    }.items():
        assert words in refused(f"compare {line}"), line


def test_runs_that_were_really_trained(trained: Path, tmp_path: Path) -> None:
    main(["evaluate", "--ckpt", f"{trained / 'best.ckpt'}", "--out", str(tmp_path / "scored")])
    main(["compare", str(trained), str(tmp_path / "scored"), "--out", str(tmp_path / "out")])
    table = pl.read_csv(tmp_path / "out" / "compare.csv")
    assert table["model"].to_list() == ["trained", "scored"] and table["auroc_difference"][1] == 0
    assert table["auroc"][0] == json.loads((trained / "metrics.json").read_text())["test"]["auroc"]["value"]
