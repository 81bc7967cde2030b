"""The page of ``ehr prepare``: its numbers by hand."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import quality
from experiments.cli import main


def events() -> pl.DataFrame:
    """Three hospitals whose median heart rates are 70, 80 and 90, and one with too few values."""
    rng = np.random.default_rng(0)
    parts = [
        pl.DataFrame({"hospital_id": name, "value": rng.normal(rate, 10, n), "concept": "heart_rate"})
        for name, rate, n in (("a", 70, 900), ("b", 80, 900), ("c", 90, 900), ("d", 200, 5))
    ]
    table = pl.concat(parts)
    return table.with_columns(minute=pl.lit(10), known=pl.lit(10), death_minute=pl.lit(None, pl.Int32))


def test_quantiles_and_shifts_are_those_of_numpy() -> None:
    table = events()
    values = table["value"].to_numpy()
    row = quality.spread(table).row(0, named=True)
    for q in quality.QUANTILES:
        assert row[f"q{round(100 * q)}"] == pytest.approx(np.quantile(values, q))
    (differ,) = quality.between_hospitals(table).to_dicts()
    medians = [np.median(table.filter(hospital_id=h)["value"]) for h in "abc"]
    assert differ["hospitals"] == 3
    assert (differ["least"], differ["greatest"]) == pytest.approx((min(medians), max(medians)))
    width = np.subtract(*np.quantile(values, [0.75, 0.25]))
    assert differ["shift"] == pytest.approx(np.std(medians, ddof=1) / width)


def test_what_could_tell_the_future_is_counted() -> None:
    table = events().head(6).with_columns(
        minute=pl.Series([10, 10, 10, -5, 10, 10]), known=pl.Series([10, 70, 9, -5, 130, 10]), death_minute=pl.Series([5, None, None, None, 20, 10])
    )  # fmt: skip
    counted = quality.checks(table, 1.0)
    assert counted["rows"].to_list() == [1, 2, 1, 1]
    assert counted["what it means"][1].startswith("median delay 1.5 hours")
    assert "1 of 4 events" in quality.checks(table, 0.25)["what it means"][0]


def test_prepare_writes_the_page(eicu: Path, tmp_path: Path) -> None:
    main(f"prepare --data SyntheticEICU --data.root {eicu} --out {tmp_path}".split())
    page = (tmp_path / "quality.html").read_text()
    assert len(page) < 3_000_000 and "<script" not in page and not re.search(r"""(src|href)=["']?http""", page)
    coverage = pl.read_csv(tmp_path / "coverage.csv")
    assert f"{coverage['rows'].sum():,}" in page and f"{coverage['rows'][0]:,}" in page
    for head in (
        "Who is left after each rule",
        "Units",
        "Checks against the future",
        "Between hospitals",
        "Raw tables that hospitals fill",
    ):
        assert f"<h2>{head}</h2>" in page


def test_another_database_is_compared_by_medians_over_the_spread_here(tmp_path: Path) -> None:
    own = pl.DataFrame({"concept": ["heart_rate"] * 4 + ["lactate"] * 2, "value": [60.0, 80, 100, 120, 1, 2]})
    coverage = pl.DataFrame({"concept": ["heart_rate", "lactate"], "stays_percent": [100.0, 50.0]})
    other = pl.DataFrame({"concept": ["heart_rate"] * 3 + ["ph"], "value": [110.0, 120, 130, 7.4]})
    other.write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"concept": ["heart_rate", "ph"], "stays_percent": [90.0, 10.0]}).write_csv(tmp_path / "coverage.csv")
    rows = quality.between_databases(own, coverage, tmp_path).to_dicts()
    assert [row["concept"] for row in rows] == ["heart_rate", "lactate", "ph"]
    assert rows[0] == {
        "concept": "heart_rate",
        "stays": 100,
        "other_stays": 90,
        "median": 90,
        "other_median": 120,
        "shift": 1,
    }
    assert rows[1]["other_median"] is None and rows[2]["median"] is None


def test_the_page_has_another_database_beside(
    mimic: Path, eicu: Path, tmp_path: Path, refused: Callable[[str], str]
) -> None:
    main(f"prepare --data SyntheticMIMICIV --data.root {mimic} --out {tmp_path / 'mimic'}".split())
    line = f"prepare --data SyntheticEICU --data.root {eicu} --out {tmp_path / 'eicu'} --beside"
    main(f"{line} {tmp_path / 'mimic'}".split())
    page = (tmp_path / "eicu" / "quality.html").read_text()
    assert "<h2>Beside mimic</h2>" in page and "median in mimic" in page
    assert "expected what `ehr prepare --out` writes" in refused(f"{line} {tmp_path}")
    assert "give a folder with --out" in refused(
        f"prepare --data SyntheticEICU --data.root {eicu} --beside {tmp_path / 'mimic'}"
    )
