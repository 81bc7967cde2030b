"""Suspicion of infection and Sepsis-3 under several published definitions, for any hospital.

A definition is one record (``Definition``) that says which evidence counts and what it needs to count; a hospital lists
the definitions that its tables can answer. Every suspicion says when its evidence was complete (``known_minute``), so
that a cohort "septic at hour 24" holds nobody who is only known to be septic from what came later.

References:
  [1] Singer 2016, Sepsis-3, JAMA 315:801, doi:10.1001/jama.2016.0287
  [2] mimic-code ``sepsis/suspicion_of_infection.sql`` and ``sepsis/sepsis3.sql`` (MIT),
      https://github.com/MIT-LCP/mimic-code
  [3] Bennett 2023, ricu, doi:10.1093/gigascience/giad041
  [4] van de Water 2024, YAIB, https://openreview.net/forum?id=ox2ATRM90I
  [5] Moor 2023, Predicting sepsis using deep learning across international sites, doi:10.1016/j.eclinm.2023.102124

Words used below:
  suspicion  one row per antibiotic (or per culture or diagnosis, where that is what a definition asks for).
  suspected  the time that counts as the start of the infection: a culture that came first, else the antibiotic.
  minute     whole minutes since ICU admission, rounded down.
"""

from typing import Literal, NamedTuple

import polars as pl

DAY = 24 * 60


class Definition(NamedTuple):
    """One definition of sepsis: what counts as suspicion of infection, and how far SOFA has to rise around it.

    Attributes:
        text: one sentence for people.
        antibiotics: sources of antibiotics that count, as the hospital names them; none: antibiotics do not count.
        needs: what an antibiotic needs to count: "" nothing; "culture": a specimen before or after it [2], known when
            both are; "two": another within 24 hours [5], known with that one; "kept_up": treatment for 72 hours or
            until death
            [4], known then; "kept_up_culture": both.
        in_icu: give an antibiotic only to the ICU stay in which it starts (else to the one in progress or next).
        diagnoses: sources of diagnoses of sepsis that count.
        diagnosis_by: minute up to which a diagnosis may be written; None: at any time, the discharge included.
        diagnosis_too: an antibiotic counts only in a stay with such a diagnosis, which then is no suspicion by itself.
        growth: a culture in which something grew counts, known with its result.
        baseline: "zero": SOFA of 2 or more [2]; "running_min": a rise by 2 above its lowest since the window opened
            [3].
        suspicions: look around "any" suspicion of the stay, or the "first" only.
        partial: no definition by itself, only shown beside the others.
    """

    text: str
    antibiotics: tuple[str, ...] = ()
    needs: Literal["", "culture", "two", "kept_up", "kept_up_culture"] = ""
    in_icu: bool = False
    diagnoses: tuple[str, ...] = ()
    diagnosis_by: int | None = DAY
    diagnosis_too: bool = False
    growth: bool = False
    baseline: Literal["zero", "running_min"] = "zero"
    suspicions: Literal["any", "first"] = "any"
    partial: bool = False


class Evidence(NamedTuple):
    """What a hospital's tables say of infections. All times are of the wall clock; eICU's count from an arbitrary
    day."""

    stays: pl.LazyFrame  # stay_id, patient_id, admitted, death (null = survived)
    # patient_id, stay_id (in progress or next, null = none), icu_stay_id (in which it starts), source, antibiotic,
    # time, stop, known (when the record was made)
    antibiotics: pl.LazyFrame
    # patient_id, stay_id, specimen_id, time (null = date only), date (midnight), specimen, positive, result (when
    # known)
    cultures: pl.LazyFrame
    diagnoses: pl.LazyFrame  # stay_id, source, time, known


SUSPICION: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),  # null = outside the ICU; then there is no admission to count from, and no minutes
    "patient_id": pl.String(),
    "evidence": pl.String(),  # antibiotic, culture or diagnosis: what the row is about; of a diagnosis, its source
    "antibiotic": pl.String(),  # as ordered; null where the row is about something else
    "antibiotic_minute": pl.Int32(),
    "culture_minute": pl.Int32(),
    "specimen": pl.String(),
    "positive_culture": pl.Boolean(),  # null = no culture
    "suspected_infection": pl.Boolean(),
    "suspected_minute": pl.Int32(),  # null = not suspected
    "known_minute": pl.Int32(),  # when the last piece of its evidence was known
}
SEPSIS3: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "onset_minute": pl.Int32(),  # end of the SOFA hour
    "suspected_minute": pl.Int32(),
    "antibiotic_minute": pl.Int32(),
    "culture_minute": pl.Int32(),
    "sofa_score": pl.Int8(),
    "known_minute": pl.Int32(),  # when both the suspicion and the SOFA hour were known
}

CULTURE_BEFORE = pl.duration(hours=72)  # a culture may precede its antibiotic by this much [1, 2]
CULTURE_AFTER = pl.duration(hours=24)
DAYS_BEFORE = pl.duration(days=3)  # the same limits for a culture with a date only
DAYS_AFTER = pl.duration(days=1)
OF_CULTURE = ("time", "known", "specimen", "positive")  # what is taken over from a culture
WINDOW_BEFORE = 48 * 60  # organ dysfunction counts from 48 hours before to 24 hours after the suspicion [1, 2]
WINDOW_AFTER = 24 * 60
SOFA_RISE = 2
COURSE = pl.duration(hours=72)  # of antibiotics that are kept up [4]
PAUSE = pl.duration(hours=24)  # longest pause within a course [4]


def suspicion(evidence: Evidence, definition: Definition) -> pl.DataFrame:
    """Suspicions of infection, schema ``SUSPICION``, by stay and time (antibiotics with a culture in the order given).

    Args:
        evidence: what the hospital's tables say.
        definition: which of it counts.
    """
    rows = []
    early = evidence.diagnoses.filter(pl.col("source").is_in(definition.diagnoses))
    if definition.diagnosis_by is not None:
        early = (
            _minutes(early, evidence, "time")
            .filter(pl.col("time_minute") <= definition.diagnosis_by)
            .drop("time_minute")
        )
    if definition.antibiotics:
        given = evidence.antibiotics.filter(pl.col("source").is_in(definition.antibiotics))
        if definition.in_icu:
            given = given.with_columns(stay_id="icu_stay_id")
        else:
            given = given.filter(pl.col("stay_id").is_not_null())
        if definition.needs == "two":
            given = two_in_a_day(given)
        if definition.needs.startswith("kept_up"):
            died = evidence.stays.select("stay_id", "death")
            given = kept_up(given.join(died, on="stay_id", how="left", maintain_order="left")).drop("death")
        if definition.diagnosis_too:
            diagnosed = early.group_by("stay_id").agg(diagnosed=pl.col("known").min())
            given = given.join(diagnosed, on="stay_id", maintain_order="left")
            given = given.with_columns(known=pl.max_horizontal("known", "diagnosed"))
        if definition.needs.endswith("culture"):
            given = match_cultures(given, evidence.cultures)
        else:
            given = given.with_columns(suspected_time="time", suspected_infection=pl.lit(True))
        rows.append(given.with_columns(evidence=pl.lit("antibiotic"), antibiotic_time="time"))
    if definition.growth:
        grown = evidence.cultures.filter("positive", pl.col("stay_id").is_not_null())
        taken = pl.coalesce("time", "date")
        rows.append(
            grown.with_columns(
                evidence=pl.lit("culture"), culture_time=taken, suspected_time=taken, known="result",
                positive_culture="positive", suspected_infection=pl.lit(True),
            )
        )  # fmt: skip
    if definition.diagnoses and not definition.diagnosis_too:
        rows.append(early.with_columns(evidence="source", suspected_time="time", suspected_infection=pl.lit(True)))
    table = pl.concat([_as_suspicion(part, evidence) for part in rows]).collect()
    if definition.in_icu:
        return table  # in the order of the orders, as [2] has them
    return table.sort(
        "stay_id", "suspected_minute", "antibiotic_minute", "evidence", "antibiotic", "specimen", "culture_minute"
    )


def _as_suspicion(rows: pl.LazyFrame, evidence: Evidence) -> pl.LazyFrame:
    present = rows.collect_schema()
    times = {"antibiotic_time", "culture_time", "suspected_time", "known"}
    rows = rows.with_columns(pl.lit(None, pl.Datetime("us")).alias(c) for c in times if c not in present)
    rows = _minutes(rows, evidence, *times)
    rows = rows.rename(
        {"known_minute": "known_minute"} | {f"{c}_minute": c.replace("time", "minute") for c in times if c != "known"}
    )
    if "patient_id" in present:
        rows = rows.with_columns(
            pl.coalesce(pl.col("of_stay"), pl.col("patient_id").cast(pl.String)).alias("patient_id")
        )
    else:
        rows = rows.rename({"of_stay": "patient_id"})
    present = rows.collect_schema()
    return rows.select(
        (pl.col(c) if c in present else pl.lit(None)).cast(kind).alias(c) for c, kind in SUSPICION.items()
    )


def _minutes(rows: pl.LazyFrame, evidence: Evidence, *times: str) -> pl.LazyFrame:
    """Add ``<time>_minute`` since the admission of the row's stay, and the stay's patient as ``of_stay``."""
    stays = evidence.stays.select("stay_id", "admitted", of_stay=pl.col("patient_id").cast(pl.String))
    rows = rows.join(stays, on="stay_id", how="left", maintain_order="left")
    since = (
        ((pl.col(t) - pl.col("admitted")).dt.total_seconds() // 60).cast(pl.Int32).alias(f"{t}_minute") for t in times
    )
    rows = rows.with_columns(since).drop("admitted")
    return rows if len(times) > 1 else rows.drop("of_stay")


def check_definition(name: str, available: dict[str, Definition], database: str) -> Definition:
    """The record of a definition; one that the database cannot answer is refused, naming those that it can."""
    if name in available:
        return available[name]
    raise ValueError(
        f"sepsis definition {name!r}: {database} has none of that name; choose one of {', '.join(available)}"
    )


def match_cultures(antibiotics: pl.LazyFrame, cultures: pl.LazyFrame) -> pl.LazyFrame:
    """Give every antibiotic its culture, by patient [2].

    Culture first: taken before the antibiotic by at most 72 hours. Antibiotic first: taken after it by at most 24
    hours. Culture first wins, and of several the earliest counts; of several at one time a positive one. A culture with
    a date only counts from the same day to 3 days before the antibiotic's day, or on that day or the next. The
    specimen's name decides whether there is a culture at all, as in [2].

    Args:
        antibiotics: ``patient_id, time, known`` and columns to keep; a null time matches nothing.
        cultures: ``patient_id, specimen_id, time`` (null = date only), ``date`` (midnight), ``specimen, positive``.

    Returns:
        The antibiotics with ``culture_time`` (midnight where there is a date only), ``specimen, positive_culture,
        suspected_infection, suspected_time``; ``known`` is when the culture was taken, if that came later. A culture
        with a date only is known at the end of that day.
    """
    # in memory: a lazy table that is read once for each of the four searches might number its rows differently each
    # time
    table = antibiotics.collect().with_row_index("row").lazy()
    ended = pl.coalesce("time", pl.col("date") + pl.duration(days=1))
    cultures = (
        cultures.select("patient_id", "specimen_id", "time", "date", "specimen", "positive", known=ended)
        .collect()
        .lazy()
    )
    cultures = cultures.sort("positive", "specimen_id", descending=[True, False])  # best of several at one time
    timed = cultures.filter(pl.col("time").is_not_null()).unique(
        ["patient_id", "time"], keep="first", maintain_order=True
    )
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
            known=pl.max_horizontal("known", pl.when(suspected).then(pl.coalesce("before_known", "after_known"))),
        )
        .drop("row", *(f"{side}_{name}" for side in ("before", "after") for name in OF_CULTURE))
    )


def _earliest(
    table: pl.LazyFrame,
    timed: pl.LazyFrame,
    dated: pl.LazyFrame,
    side: str,
    limits: tuple[pl.Expr, pl.Expr],
    days: tuple[pl.Expr, pl.Expr],
) -> pl.LazyFrame:
    """Add the earliest culture between the limits, both included; on one day a timed culture goes before a dated
    one."""

    def search(cultures: pl.LazyFrame, kind: str, low: pl.Expr, high: pl.Expr) -> pl.LazyFrame:
        renamed = cultures.select("patient_id", *(pl.col(name).alias(f"{kind}_{name}") for name in OF_CULTURE)).sort(
            f"{kind}_time"
        )
        searched = table.select("row", "patient_id", low=low, high=high).sort("low", nulls_last=True)
        joined = searched.join_asof(
            renamed,
            left_on="low",
            right_on=f"{kind}_time",
            by="patient_id",
            strategy="forward",
            coalesce=False,
            check_sortedness=False,
        )
        inside = (pl.col(f"{kind}_time") <= pl.col("high")).fill_null(False)
        return joined.select(
            "row", *(pl.when(inside).then(f"{kind}_{name}").alias(f"{kind}_{name}") for name in OF_CULTURE)
        )

    both = search(timed, "timed", *limits).join(search(dated, "dated", *days), on="row")
    dated_first = (pl.col("dated_time") < pl.col("timed_time").dt.truncate("1d")).fill_null(
        pl.col("timed_time").is_null()
    )
    chosen = (
        pl.when(dated_first).then(f"dated_{name}").otherwise(f"timed_{name}").alias(f"{side}_{name}")
        for name in OF_CULTURE
    )
    return table.join(both.select("row", *chosen), on="row")


def sepsis3(suspicion: pl.DataFrame, sofa: pl.DataFrame, definition: Definition) -> pl.DataFrame:
    """One row per septic stay: organ dysfunction from 48 hours before to 24 hours after a suspicion of infection.

    Args:
        suspicion: schema ``SUSPICION``; rows without a stay or a suspected time are passed over.
        sofa: schema ``sofa.SOFA``.
        definition: its ``baseline`` and ``suspicions`` are used: with "running_min" a patient who arrives with a high
            SOFA that stays level does not count [3]; with "first" only the earliest suspicion of a stay is looked
            around [3].

    Returns:
        Schema ``SEPSIS3``, sorted by stay. Of several, the row that comes first by suspected time, antibiotic, culture
        and SOFA hour [2]. The onset is the end of that SOFA hour; it is after admission, though it may precede the
        suspicion.
    """
    order = ["suspected_minute", "antibiotic_minute", "culture_minute"]
    candidates = suspicion.lazy().filter(pl.col("stay_id").is_not_null(), pl.col("suspected_minute").is_not_null())
    candidates = (
        candidates.select("stay_id", *order, "known_minute")
        .sort("stay_id", *order, "known_minute")
        .unique(["stay_id", "suspected_minute"], keep="first", maintain_order=True)
    )
    if definition.suspicions == "first":
        candidates = candidates.unique("stay_id", keep="first", maintain_order=True)
    scores = sofa.lazy().select("stay_id", onset_minute="end_minute", sofa_score="sofa_24h")
    opens, closes = pl.col("suspected_minute") - WINDOW_BEFORE, pl.col("suspected_minute") + WINDOW_AFTER
    if definition.baseline == "zero":
        failing = scores.filter(pl.col("sofa_score") >= SOFA_RISE).sort("onset_minute")
        opened = candidates.with_columns(opens=opens).sort("opens")
        septic = opened.join_asof(
            failing, left_on="opens", right_on="onset_minute", by="stay_id", strategy="forward", check_sortedness=False
        )
        septic = septic.filter(pl.col("onset_minute") <= closes)
    else:
        lowest = pl.col("sofa_score").cum_min().over("stay_id", "suspected_minute", order_by="onset_minute")
        inside = candidates.join(scores, on="stay_id").filter(pl.col("onset_minute").is_between(opens, closes))
        septic = inside.filter(pl.col("sofa_score") - lowest >= SOFA_RISE)
    first = septic.sort("stay_id", *order, "onset_minute").unique("stay_id", keep="first", maintain_order=True)
    complete = pl.max_horizontal("known_minute", "onset_minute")
    return first.with_columns(known_minute=complete).select(*SEPSIS3).cast(SEPSIS3).collect()  # type: ignore[arg-type]


def known_septic(suspicion: pl.DataFrame, sofa: pl.DataFrame, definition: Definition, before: int) -> pl.DataFrame:
    """``sepsis3`` from what was known strictly before a minute of each stay.

    Args:
        suspicion: of the whole record; rows known later are left out here.
        sofa: scored from records known before that minute; an hour that ends at it or later is not over.
        definition: as for ``sepsis3``.
        before: minutes since ICU admission.
    """
    early = suspicion.filter(pl.col("known_minute") < before)
    return sepsis3(early, sofa.filter(pl.col("end_minute") < before), definition)


def two_in_a_day(antibiotics: pl.LazyFrame) -> pl.LazyFrame:
    """Antibiotic records that another follows within 24 hours, at another minute [5]; known when the second one is.

    Args:
        antibiotics: ``stay_id, time, known`` and columns to keep.
    """
    times = antibiotics.select("stay_id", "time", "known").unique()
    pairs = times.join(times, on="stay_id", suffix="_second")
    later = pl.col("time_second") - pl.col("time")
    pairs = pairs.filter(later > pl.duration(minutes=0), later <= pl.duration(minutes=DAY))
    second = pairs.group_by("stay_id", "time").agg(second=pl.col("known_second").min())
    both = antibiotics.join(second, on=["stay_id", "time"], maintain_order="left")
    return both.with_columns(known=pl.max_horizontal("known", "second")).drop("second")


def kept_up(antibiotics: pl.LazyFrame) -> pl.LazyFrame:
    """Antibiotics after which treatment goes on for 72 hours, or until death, without a pause of more than a day [4].

    That it went on is known when the 72 hours are over or the patient has died.

    Args:
        antibiotics: ``stay_id, time, stop, death`` (null = survived), ``known`` and columns to keep.
    """
    stopped = pl.col("end").cum_max().shift(1).over("stay_id", order_by="time")
    begins = (pl.col("time") > stopped + PAUSE).fill_null(True).cast(pl.Int32)
    until = pl.min_horizontal(pl.col("time") + COURSE, "death")
    return (
        antibiotics.filter(pl.col("time").is_not_null())
        .with_columns(end=pl.max_horizontal("time", "stop"))
        .sort("stay_id", "time")
        .with_columns(begins=begins)
        .with_columns(course=pl.col("begins").cum_sum().over("stay_id", order_by="time"))
        .filter(pl.col("end").max().over("stay_id", "course") + PAUSE >= until)
        .with_columns(known=pl.max_horizontal("known", until))
        .drop("end", "begins", "course")
    )


def summarise(name: str, suspicion: pl.DataFrame, septic: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """One row for the table of definitions: how many stays are suspected and septic, in how many hospitals, how many
    died.

    Percentages are of all ``stays``; mortality is in hospital, over the stays whose outcome is known.
    """
    of_stays = pl.col("suspected_minute").is_not_null() & pl.col("stay_id").is_not_null()
    suspected = suspicion.filter(of_stays).select("stay_id").unique()
    row: dict[str, object] = {"definition": name}
    schema: dict[str, pl.DataType] = {"definition": pl.String()}
    for kind, chosen in (("suspected", suspected), ("sepsis", septic)):
        members = stays.join(chosen, on="stay_id", how="semi")
        died = members["hospital_death"].mean()
        row |= {
            f"{kind}_stays": members.height,
            f"{kind}_percent": round(100 * members.height / max(stays.height, 1), 2),
            f"{kind}_hospitals": members["hospital_id"].n_unique(),
            f"{kind}_mortality_percent": None if died is None else round(100 * float(died), 1),  # type: ignore[arg-type]
        }
        schema |= {f"{kind}_stays": pl.Int64(), f"{kind}_percent": pl.Float64()}
        schema |= {f"{kind}_hospitals": pl.Int64(), f"{kind}_mortality_percent": pl.Float64()}
    return pl.DataFrame([row], schema=schema)
