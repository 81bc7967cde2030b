"""Treatment response: what is derived from infusions, fluids and urine, each with a table before and after."""

import doctest

import numpy as np
import polars as pl
import pytest

from datamodules.derive import treatment
from datamodules.derive.treatment import NOREPINEPHRINE_EQUIVALENT, estimated_events, volume_events
from datamodules.dictionary import BY_NAME, CONCEPT, CONCEPTS, NAMES
from datamodules.schema import EVENTS


def events(*rows: tuple[int, int, str, float] | tuple[int, int, str, float, int]) -> pl.DataFrame:
    """Events of (stay, minute, concept, value, when it was known: default ``minute``)."""
    schema = {"stay": pl.Int32, "minute": pl.Int32, "concept": CONCEPT, "value": pl.Float32, "known_minute": pl.Int32}
    return pl.DataFrame([row if len(row) == 5 else (*row, row[1]) for row in rows], schema, orient="row")


def derived(table: pl.DataFrame) -> pl.DataFrame:
    """``treatment.derived`` of a table in any order, as a table."""
    table = table.sort("stay", "minute", pl.col("concept").to_physical(), "value").cast({"concept": pl.String})
    code = np.array([NAMES.index(name) for name in table["concept"]], np.int64)
    columns = (table[c].to_numpy().astype(np.int64) for c in ("stay", "minute", "known_minute"))
    stay, minute, known, concept, value = treatment.derived(*columns, code, table["value"].to_numpy())
    named = {"concept": [NAMES[c] for c in concept], "value": value}
    return pl.DataFrame({"stay": stay, "minute": minute, "known_minute": known, **named})


def after(table: pl.DataFrame, concept: str, stay: int = 0) -> list[tuple[int, float]]:
    found = table.filter(pl.col("concept") == concept, pl.col("stay") == stay).sort("minute")
    return [(minute, round(value, 4)) for minute, value in found.select("minute", "value").iter_rows()]


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(treatment).failed == 0


def test_rate_events_add_overlaps_and_end_at_zero() -> None:
    """Two pumps of one drug add; another stay and another drug do not; no float dust is left after the end."""
    columns = ["stay_id", "start_minute", "end_minute", "drug", "rate"]
    before = [
        (1, 0, 60, "dopamine", 0.1),
        (1, 30, 90, "dopamine", 0.2),
        (1, 30, 40, "milrinone", 0.3),
        (2, 30, 40, "dopamine", 5.0),
    ]
    after = treatment.rate_events(pl.DataFrame(before, columns, orient="row")).collect()
    assert after.schema == pl.Schema(EVENTS)
    assert after.filter(stay_id=1, concept="dopamine").select("minute", "value").rows() == [
        (0, 0.1),
        (30, 0.3),
        (60, 0.2),
        (90, 0.0),
    ]
    assert after.filter(stay_id=1, concept="milrinone").select("minute", "value").rows() == [(30, 0.3), (40, 0.0)]
    assert after.filter(stay_id=2).select("minute", "value").rows() == [(30, 5.0), (40, 0.0)]


def test_ventilation_spells() -> None:
    """[Bennett 2023] on until off or six silent hours; a spell counts however short it was; the highest sign of a minute holds."""
    before = [
        (1, 0, 2),
        (1, 0, 0),
        (1, 300, 2),
        (1, 900, 2),
        (1, 960, 0),
        (2, 0, 2),
        (2, 20, 0),
        (3, 10, 1),
        (3, 50, 2),
    ]
    after = treatment.ventilation_events(pl.DataFrame(before, ["stay_id", "minute", "level"], orient="row")).collect()
    assert after.select("stay_id", "minute", "value").rows() == [
        (1, 0, 2),
        (1, 300, 2),
        (1, 660, 0),  # 300 + six hours without a sign
        (1, 900, 2),
        (1, 960, 0),
        (2, 0, 2),  # 20 minutes of ventilation: that they were so few is known only afterwards
        (2, 20, 0),
        (3, 10, 1),
        (3, 50, 2),
        (3, 410, 0),
    ]


def test_norepinephrine_equivalent_adds_the_drugs() -> None:
    """[mimic-code norepinephrine_equivalent_dose.sql] NE + Epi + Phe/10 + Dopa/100 + Vaso (units/h) x 2.5/60."""
    before = events(
        (0, 0, "norepinephrine", 0.2),
        (0, 60, "vasopressin", 2.4),
        (0, 90, "phenylephrine", 1.0),
        (0, 120, "norepinephrine", 0.0),
        (1, 0, "dopamine", 5.0),
        (1, 30, "dobutamine", 5.0),  # an inotrope: no part of the sum
    )
    assert after(derived(before), "norepinephrine_equivalent") == [(0, 0.2), (60, 0.3), (90, 0.4), (120, 0.2)]
    assert after(derived(before), "norepinephrine_equivalent", 1) == [(0, 0.05)]


def test_change_says_started_rising_falling_and_steady() -> None:
    """Against 3 hours before: equal to the load = started, positive = rising, negative = falling, back to 0 = steady."""
    before = events((0, 0, "norepinephrine", 0.1), (0, 60, "norepinephrine", 0.3), (0, 300, "norepinephrine", 0.05))
    change = after(derived(before), "norepinephrine_equivalent_change")
    #      started      rising       0.3-0.1      0.3-0.3    0.05-0.3      steady
    assert change == [(0, 0.1), (60, 0.3), (180, 0.2), (240, 0.0), (300, -0.25), (480, 0.0)]


def test_urine_rate_per_kg_and_hour() -> None:
    """[mimic-code urine_output_rate.sql] volume over the time since the last charting and the last known weight."""
    before = events(
        (0, 0, "weight", 80),
        (0, 60, "urine", 100),  # the first: since when is not known
        (0, 180, "urine", 160),  # 160 / 80 kg / 2 h
        (0, 190, "urine", 40),  # 10 minutes later: taken for an hour
        (0, 200, "weight", 100),
        (0, 310, "urine", 100),
        (0, 310, "urine", 20),  # two catheters
        (0, 5000, "urine", 900),  # more than a day later: no rate
        (1, 60, "urine", 100),
        (1, 120, "urine", 100),  # no weight
    )
    assert after(derived(before), "urine_rate") == [(180, 1.0), (190, 0.5), (310, 0.6)]
    assert after(derived(before), "urine_rate", 1) == []


def test_a_urine_rate_uses_what_was_known_when_its_volume_was() -> None:
    """The volume of minute 120 was entered at 400, after that of 180: until then that one is since minute 60; so is the weight."""
    before = events(
        (0, 0, "weight", 80),
        (0, 60, "urine", 100, 60),
        (0, 120, "urine", 80, 400),
        (0, 150, "weight", 100, 200),
        (0, 180, "urine", 160, 190),
        (0, 240, "urine", 100, 410),
    )
    found = derived(before).filter(pl.col("concept") == "urine_rate").sort("minute")
    assert found.select("minute", "known_minute", pl.col("value").cast(pl.Float64).round(4)).rows() == [
        (120, 400, 0.8),  # known at 400: by then the weight is 100 kg
        (180, 190, 1.0),  # 160 mL in the 2 h since minute 60, 80 kg
        (240, 410, 1.0),
    ]


def test_the_total_coma_scale_is_derived_where_all_three_parts_are_charted() -> None:
    parts = ("gcs_eyes", "gcs_verbal", "gcs_motor")
    before = events(
        *((0, 10, part, 3, known) for part, known in zip(parts, (12, 30, 10), strict=True)),
        *((0, 60, part, 2) for part in parts[:2]),  # no motor score
        *((0, 90, part, 4) for part in parts),
        (0, 90, "gcs", 14),  # charted itself
        *((0, 120, part, 4, 125) for part in parts),
        (0, 120, "gcs", 14, 300),  # charted itself, but entered only later
    )
    found = derived(before).filter(pl.col("concept") == "gcs").sort("minute")
    assert found.select("minute", "known_minute", "value").rows() == [(10, 30, 9), (120, 125, 12)]


def test_nothing_derived_looks_ahead() -> None:
    """Cutting the record at any minute leaves every value before it as it was."""
    rows = [
        (0, 0, "weight", 80.0),
        (0, 10, "norepinephrine", 0.1),
        (0, 60, "urine", 90.0),
        (0, 200, "norepinephrine", 0.2),
        (0, 240, "urine", 50.0),
    ]
    whole = derived(events(*rows))
    for cut in range(0, 300, 20):
        part = derived(events(*(r for r in rows if r[1] < cut))).filter(pl.col("minute") < cut)
        for concept in whole["concept"].unique():
            assert after(part, concept) == [(m, v) for m, v in after(whole, concept) if m < cut]


def plainly(rows: list[tuple[int, str, float, int]]) -> list[tuple[str, int, int, float]]:
    """(concept, minute, known, value) that are derived from (minute, concept, value, known) of one stay, one by one."""
    found = []

    def held(drug: str, minute: int) -> float:
        steps = sorted((m, v) for m, c, v, _ in rows if c == drug and m <= minute)
        return steps[-1][1] if steps else 0.0

    def load(minute: int) -> float:
        return sum(weight * held(drug, minute) for drug, weight in NOREPINEPHRINE_EQUIVALENT.items())

    steps = {m for m, c, *_ in rows if c in NOREPINEPHRINE_EQUIVALENT}
    found += [("norepinephrine_equivalent", m, m, load(m)) for m in steps]
    change = "norepinephrine_equivalent_change"
    found += [(change, m, m, load(m) - load(m - 180)) for m in steps | {m + 180 for m in steps}]
    charted = {m: [(v, k) for n, c, v, k in rows if (n, c) == (m, "urine")] for m in {r[0] for r in rows}}
    urine = {m: (sum(v for v, _ in parts), max(k for _, k in parts)) for m, parts in charted.items() if parts}
    for minute, (volume, known) in urine.items():
        since = max((m for m, (_, k) in urine.items() if m < minute and k <= known), default=None)
        weights = sorted((k, v) for _, c, v, k in rows if c == "weight" and k <= known)
        if since is not None and minute - since <= 1440 and weights:
            found.append(("urine_rate", minute, known, volume / weights[-1][1] / max((minute - since) / 60, 1)))
    for minute in {r[0] for r in rows}:
        at = [r for r in rows if r[0] == minute]
        parts = [[(v, k) for _, c, v, k in at if c == name] for name in ("gcs_eyes", "gcs_verbal", "gcs_motor")]
        if all(parts):
            known = max(min(k for _, k in part) for part in parts)
            if not any(c == "gcs" and k <= known for _, c, _, k in at):
                found.append(("gcs", minute, known, sum(max(v for v, _ in part) for part in parts)))
    return sorted(found)


def test_many_stays_at_once_give_what_each_gives_one_row_after_another() -> None:
    rng = np.random.default_rng(0)
    names = [*NOREPINEPHRINE_EQUIVALENT, *["urine"] * 4, "weight", "gcs", "gcs_eyes", "gcs_verbal", "gcs_motor"]
    stays = {}
    for stay in range(40):
        drawn = [(int(rng.integers(24)) * 40, str(rng.choice(names)), int(rng.integers(1, 9))) for _ in range(60)]
        stays[stay] = [(m, c, v, m + 50 * int(rng.integers(4))) for m, c, v in dict.fromkeys(drawn)]
        stays[stay] = [(m, c, v, m if c in NOREPINEPHRINE_EQUIVALENT else k) for m, c, v, k in stays[stay]]
    found = derived(events(*((stay, m, c, v, k) for stay, rows in stays.items() for m, c, v, k in rows)))
    assert found["concept"].n_unique() == 4
    for stay, rows in stays.items():
        own = found.filter(stay=stay).select("concept", "minute", "known_minute", "value").sort(pl.all()).rows()
        expected = plainly(rows)
        assert [row[:3] for row in own] == [row[:3] for row in expected]
        assert [row[3] for row in own] == pytest.approx([row[3] for row in expected], rel=1e-5, abs=2e-6)


def test_nothing_is_derived_from_nothing() -> None:
    assert derived(events((0, 0, "heart_rate", 80.0))).is_empty()


def test_estimated_is_on_while_any_assumed_rate_runs() -> None:
    """One pump with a native rate, two with an assumed concentration that overlap."""
    columns = ["stay_id", "start_minute", "end_minute", "drug", "rate", "unit", "estimated"]
    rows = [
        (1, 0, 500, "dopamine", 5.0, "", False),
        (1, 60, 120, "norepinephrine", 0.1, "", True),
        (1, 90, 180, "vasopressin", 1.0, "", True),
    ]
    found = estimated_events(pl.DataFrame(rows, columns, orient="row")).sort("minute").collect()
    assert list(zip(found["minute"], found["value"], strict=True)) == [(60, 1.0), (90, 1.0), (120, 1.0), (180, 0.0)]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ((0, 60, 500.0), [(59, 500.0)]),
        ((30, 90, 100.0), [(59, 50.0), (89, 50.0)]),
        ((-30, 60, 90.0), [(-1, 30.0), (59, 60.0)]),
        ((10, 10, 250.0), [(10, 250.0)]),  # a bolus charted with one time
    ],
)
def test_volumes_are_spread_over_their_hours(before: tuple[int, int, float], expected: list[tuple[int, float]]) -> None:
    table = pl.LazyFrame([(1, *before)], ["stay_id", "start_minute", "end_minute", "volume"], orient="row")
    found = volume_events(table, "fluids").sort("minute").collect()
    assert [(m, round(v, 6)) for m, v in zip(found["minute"], found["value"], strict=True)] == expected


def test_the_treatment_group_holds_what_is_given_and_its_response() -> None:
    group = {c.name for c in CONCEPTS if c.treatment}
    assert group >= {
        "urine",
        "urine_rate",
        "fluids",
        "fio2",
        "peep",
        "ventilation",
        "norepinephrine_equivalent",
        *NOREPINEPHRINE_EQUIVALENT,
    }
    assert not BY_NAME["mean_bp"].treatment
