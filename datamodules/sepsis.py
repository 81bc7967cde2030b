"""Suspicion of infection and Sepsis-3 under several published definitions, for any hospital.

References:
  [1] Singer 2016, Sepsis-3, JAMA 315:801, doi:10.1001/jama.2016.0287
  [2] mimic-code ``sepsis/suspicion_of_infection.sql`` and ``sepsis/sepsis3.sql`` (MIT), https://github.com/MIT-LCP/mimic-code
  [3] Bennett 2023, ricu, doi:10.1093/gigascience/giad041
  [4] van de Water 2024, YAIB, https://openreview.net/forum?id=ox2ATRM90I
  [5] Moor 2023, Predicting sepsis using deep learning across international sites, doi:10.1016/j.eclinm.2023.102124

Words used below:
  suspicion  one row per antibiotic (or per diagnosis, where that is what a definition asks for).
  suspected  the time that counts as the start of the infection: a culture that came first, else the antibiotic.
  minute     whole minutes since ICU admission, rounded down.
"""

from typing import Literal

import polars as pl

DEFINITIONS: dict[str, str] = {
    "mimic_code": "antibiotic ordered in the ICU and culture; SOFA of 2 or more [2]",
    "ricu": "antibiotic ordered or given, and culture, in the admission; SOFA rises by 2 around the first suspicion [3]",
    "yaib": "antibiotic kept up for 3 days (and culture where charted); SOFA rises by 2 around the first suspicion [4]",
    "moor": "2 antibiotics in 24 hours or a positive culture (MIMIC-IV: antibiotic and culture); SOFA rises by 2 around any suspicion [5]",
    "eicu": "2 antibiotics in 24 hours, an early diagnosis of sepsis or a positive culture; SOFA of 2 or more",
    "apache": "APACHE admission diagnosis of sepsis; SOFA of 2 or more",
    "diagnosis": "diagnosis of sepsis written within 24 hours of admission; SOFA of 2 or more",
    "any_antibiotic_and_diagnosis": "an antibiotic in any table and one of these two diagnoses; SOFA of 2 or more",
    "literal": "antibiotic and culture as [1] asks; SOFA of 2 or more",
}

SUSPICION: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),  # null = outside the ICU; the minutes are then null too, for there is no admission to count from
    "patient_id": pl.String(),
    "evidence": pl.String(),  # antibiotic, culture, apache or diagnosis: what the row is about
    "antibiotic": pl.String(),  # as ordered; null where the row is about something else
    "antibiotic_minute": pl.Int32(),
    "culture_minute": pl.Int32(),
    "specimen": pl.String(),
    "positive_culture": pl.Boolean(),  # null = no culture
    "suspected_infection": pl.Boolean(),
    "suspected_minute": pl.Int32(),  # null = not suspected
}
SEPSIS3: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "onset_minute": pl.Int32(),  # end of the SOFA hour
    "suspected_minute": pl.Int32(),
    "antibiotic_minute": pl.Int32(),
    "culture_minute": pl.Int32(),
    "sofa_score": pl.Int8(),
}

CULTURE_BEFORE = pl.duration(hours=72)  # a culture may precede its antibiotic by this much [1, 2]
CULTURE_AFTER = pl.duration(hours=24)
DAYS_BEFORE = pl.duration(days=3)  # the same limits for a culture with a date only
DAYS_AFTER = pl.duration(days=1)
FOUND = ("time", "specimen", "positive")  # what is taken over from a culture
WINDOW_BEFORE = 48 * 60  # organ dysfunction counts from 48 hours before to 24 hours after the suspicion [1, 2]
WINDOW_AFTER = 24 * 60
SOFA_RISE = 2


def check_definition(definition: str, available: tuple[str, ...], database: str) -> None:
    """Refuse a definition that the database cannot answer, naming those that it can."""
    if definition in available:
        return
    reason = f"{database} lacks what it needs" if definition in DEFINITIONS else "there is no such definition"
    raise ValueError(f"sepsis definition {definition!r}: {reason}; choose one of {', '.join(available)}")


def match_cultures(antibiotics: pl.LazyFrame, cultures: pl.LazyFrame) -> pl.LazyFrame:
    """Give every antibiotic its culture, by patient [2].

    Culture first: taken before the antibiotic by at most 72 hours. Antibiotic first: taken after it by at most 24 hours.
    Culture first wins, and of several the earliest counts; of several at one time a positive one. A culture with a date
    only counts from the same day to 3 days before the antibiotic's day, or on that day or the next. The specimen's name
    decides whether there is a culture at all, as in [2].

    Args:
        antibiotics: ``patient_id, time`` and columns to keep; a null time matches nothing.
        cultures: ``patient_id, specimen_id, time`` (null = date only), ``date`` (midnight), ``specimen, positive``.

    Returns:
        The antibiotics with ``culture_time`` (midnight where there is a date only), ``specimen, positive_culture,
        suspected_infection, suspected_time``.
    """
    # in memory: a lazy table that is read once for each of the four searches might number its rows differently each time
    table = antibiotics.collect().with_row_index("row").lazy()
    cultures = cultures.collect().lazy().sort("positive", "specimen_id", descending=[True, False])  # best of several at one time
    timed = cultures.filter(pl.col("time").is_not_null()).unique(["patient_id", "time"], keep="first", maintain_order=True)
    dated = (
        cultures.filter(pl.col("time").is_null())
        .with_columns(time="date")
        .unique(["patient_id", "time"], keep="first", maintain_order=True)
    )
    given, day, tick = pl.col("time"), pl.col("time").dt.truncate("1d"), pl.duration(microseconds=1)
    table = _earliest(table, timed, dated, "before", (given - CULTURE_BEFORE, given - tick), (day - DAYS_BEFORE, day))
    table = _earliest(table, timed, dated, "after", (given + tick, given + CULTURE_AFTER), (day, day + DAYS_AFTER))
    suspected = pl.coalesce("before_specimen", "after_specimen").is_not_null()
    return (
        table.sort("row")
        .with_columns(
            culture_time=pl.coalesce("before_time", "after_time"),
            specimen=pl.coalesce("before_specimen", "after_specimen"),
            positive_culture=pl.coalesce("before_positive", "after_positive"),
            suspected_infection=suspected,
            suspected_time=pl.when(suspected).then(pl.coalesce("before_time", "time")),
        )
        .drop("row", *(f"{side}_{name}" for side in ("before", "after") for name in FOUND))
    )


def _earliest(
    table: pl.LazyFrame, timed: pl.LazyFrame, dated: pl.LazyFrame, side: str, limits: tuple[pl.Expr, pl.Expr], days: tuple[pl.Expr, pl.Expr]
) -> pl.LazyFrame:
    """Add the earliest culture between the limits, both included; on one day a timed culture goes before a dated one."""

    def search(cultures: pl.LazyFrame, kind: str, low: pl.Expr, high: pl.Expr) -> pl.LazyFrame:
        renamed = cultures.select("patient_id", *(pl.col(name).alias(f"{kind}_{name}") for name in FOUND)).sort(f"{kind}_time")
        searched = table.select("row", "patient_id", low=low, high=high).sort("low", nulls_last=True)
        joined = searched.join_asof(
            renamed, left_on="low", right_on=f"{kind}_time", by="patient_id", strategy="forward", coalesce=False, check_sortedness=False
        )
        inside = (pl.col(f"{kind}_time") <= pl.col("high")).fill_null(False)
        return joined.select("row", *(pl.when(inside).then(f"{kind}_{name}").alias(f"{kind}_{name}") for name in FOUND))

    both = search(timed, "timed", *limits).join(search(dated, "dated", *days), on="row")
    dated_first = (pl.col("dated_time") < pl.col("timed_time").dt.truncate("1d")).fill_null(pl.col("timed_time").is_null())
    chosen = (pl.when(dated_first).then(f"dated_{name}").otherwise(f"timed_{name}").alias(f"{side}_{name}") for name in FOUND)
    return table.join(both.select("row", *chosen), on="row")


def sepsis3(
    suspicion: pl.DataFrame,
    sofa: pl.DataFrame,
    baseline: Literal["zero", "running_min"] = "zero",
    suspicions: Literal["any", "first"] = "any",
) -> pl.DataFrame:
    """One row per septic stay: organ dysfunction from 48 hours before to 24 hours after a suspicion of infection.

    Args:
        suspicion: schema ``SUSPICION``; rows without a stay or a suspected time are passed over.
        sofa: schema ``sofa.SOFA``.
        baseline: "zero": a 24-hour SOFA of 2 or more [2]. "running_min": a SOFA 2 or more above its lowest value since the
            window opened, so that a patient who arrives with a high SOFA that stays level does not count [3].
        suspicions: "any" looks around every suspicion of the stay, "first" around the earliest one only [3].

    Returns:
        Schema ``SEPSIS3``, sorted by stay. Of several, the row that comes first by suspected time, antibiotic, culture and
        SOFA hour [2]. The onset is the end of that SOFA hour; it is after admission, though it may precede the suspicion.
    """
    order = ["suspected_minute", "antibiotic_minute", "culture_minute"]
    candidates = suspicion.lazy().filter(pl.col("stay_id").is_not_null(), pl.col("suspected_minute").is_not_null())
    candidates = (
        candidates.select("stay_id", *order)
        .sort("stay_id", *order)
        .unique(["stay_id", "suspected_minute"], keep="first", maintain_order=True)
    )
    if suspicions == "first":
        candidates = candidates.unique("stay_id", keep="first", maintain_order=True)
    scores = sofa.lazy().select("stay_id", onset_minute="end_minute", sofa_score="sofa_24h")
    opens, closes = pl.col("suspected_minute") - WINDOW_BEFORE, pl.col("suspected_minute") + WINDOW_AFTER
    if baseline == "zero":
        failing = scores.filter(pl.col("sofa_score") >= SOFA_RISE).sort("onset_minute")
        opened = candidates.with_columns(opens=opens).sort("opens")
        found = opened.join_asof(
            failing, left_on="opens", right_on="onset_minute", by="stay_id", strategy="forward", check_sortedness=False
        )
        found = found.filter(pl.col("onset_minute") <= closes)
    else:
        lowest = pl.col("sofa_score").cum_min().over("stay_id", "suspected_minute", order_by="onset_minute")
        inside = candidates.join(scores, on="stay_id").filter(pl.col("onset_minute").is_between(opens, closes))
        found = inside.filter(pl.col("sofa_score") - lowest >= SOFA_RISE)
    first = found.sort("stay_id", *order, "onset_minute").unique("stay_id", keep="first", maintain_order=True)
    return first.select(*SEPSIS3).cast(SEPSIS3).collect()  # type: ignore[arg-type]


def kept_up(antibiotics: pl.LazyFrame, days: int = 3, gap_hours: int = 24) -> pl.LazyFrame:
    """Antibiotics after which treatment goes on for three days, or until death, without a gap of more than a day [4].

    Args:
        antibiotics: ``stay_id, antibiotic_minute, stop_minute, death_minute`` (null = survived) and columns to keep.
        days: how long treatment has to go on.
        gap_hours: longest pause between the latest stop so far and the next start.
    """
    gap = gap_hours * 60
    stopped = pl.col("stop").cum_max().shift(1).over("stay_id", order_by="antibiotic_minute")
    course = (pl.col("antibiotic_minute") > stopped + gap).fill_null(True).cast(pl.Int32)
    until = pl.min_horizontal(pl.col("antibiotic_minute") + days * 24 * 60, "death_minute")
    return (
        antibiotics.with_columns(stop=pl.max_horizontal("antibiotic_minute", "stop_minute"))
        .sort("stay_id", "antibiotic_minute")
        .with_columns(starts=course)
        .with_columns(course=pl.col("starts").cum_sum().over("stay_id", order_by="antibiotic_minute"))
        .filter(pl.col("stop").max().over("stay_id", "course") + gap >= until)
        .drop("stop", "starts", "course")
    )


def summarise(definition: str, suspicion: pl.DataFrame, septic: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """One row for the table of definitions: how many stays are suspected and septic, in how many hospitals, how many died.

    Percentages are of all ``stays``; mortality is in hospital, over the stays whose outcome is known.
    """
    suspected = suspicion.filter(pl.col("suspected_minute").is_not_null(), pl.col("stay_id").is_not_null()).select("stay_id").unique()
    row: dict[str, object] = {"definition": definition}
    for name, chosen in (("suspected", suspected), ("sepsis", septic)):
        of = stays.join(chosen, on="stay_id", how="semi")
        died = of["hospital_death"].mean()
        row |= {
            f"{name}_stays": of.height,
            f"{name}_percent": round(100 * of.height / max(stays.height, 1), 2),
            f"{name}_hospitals": of["hospital_id"].n_unique(),
            f"{name}_mortality_percent": None if died is None else round(100 * float(died), 1),  # type: ignore[arg-type]
        }
    kinds = {"stays": pl.Int64(), "percent": pl.Float64(), "hospitals": pl.Int64(), "mortality_percent": pl.Float64()}
    schema = {"definition": pl.String(), **{f"{name}_{what}": kind for name in ("suspected", "sepsis") for what, kind in kinds.items()}}
    return pl.DataFrame([row], schema=schema)
