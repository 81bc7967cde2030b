"""eICU: ``intakeOutput``, a flowsheet whose cells are named by a path: urine, volumes into a vein, body weight.

Sources of the rules:
  [E] eicu-code ``concepts/pivoted/pivoted-uo.sql``, ``pivoted-weight.sql`` (MIT)
      https://github.com/MIT-LCP/eicu-code
  [P] choices of this project
"""

import polars as pl

from datamodules.dictionary import BY_NAME, CONCEPT, conversion, words
from datamodules.schema import as_events

OUTPUT_CELLS = "flowsheet|flowsheet cell labels|i&o|output (ml)|"
INTAKE_CELLS = "flowsheet|flowsheet cell labels|i&o|intake (ml)|"
# cells below INTAKE_CELLS that are no volume into a vein: by mouth or tube, sums of other cells, doses [P]
NOT_INTRAVENOUS = (
    r"total|p\.o|\bpo\b|oral|enteral|tube|gastric|jejun|meal|feed|formula|irrigant|\(mcg\)"
    r"|^intake$|^misc|^#|^insulin$|^fentanyl$"
)
PARENTERAL_NUTRITION = r"tpn|ppn|lipid|fat emulsion"
WEIGHT_CELLS = {"|bodyweight (kg)": "kg", "|bodyweight (lb)": "lb"}  # [E: pivoted-weight.sql]
ENTRY_MAX = 2000  # mL in one entry [P]: the demo goes up to 7,746, a shift's total or a typing error


def entered(rows: pl.LazyFrame, entry: str) -> pl.LazyFrame:
    """Add ``known_minute``: when a record was entered, if that came after the minute that it is charted for."""
    return rows.with_columns(known_minute=pl.max_horizontal("minute", pl.col(entry).cast(pl.Int32)))


def weights(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Charted body weights in kg, within the range of ``concepts.csv``: ``stay_id, known_minute, kg``."""
    cells = rows.select("cellpath").unique().with_columns(concept_of_cell(pl.col("cellpath")))
    rows = entered(rows.join(cells.filter(pl.col("concept") == "weight"), on="cellpath"), "intakeoutputentryoffset")
    factor = pl.col("unit").replace_strict({u: conversion("weight", u)[0] for u in WEIGHT_CELLS.values()})
    rows = rows.select("stay_id", "known_minute", kg=pl.col("cellvaluenumeric") * factor.cast(pl.Float64))
    return rows.filter(pl.col("kg").is_between(BY_NAME["weight"].low, BY_NAME["weight"].high))


def volumes(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Urine (mL, clipped at 2,000 an entry), volumes given into a vein (mL, likewise clipped) and charted body weight.

    The urine cells are those of [E: pivoted-uo.sql] and a few further names (in the demo 1,330 rows of "Indwelling
    Catheter Output"), without the cells that hold a count of voids or of incontinence: a "1" there is an occasion, not
    a millilitre.
    """
    rows = rows.with_columns(
        dropped=pl.when(~pl.struct(rows.collect_schema().names()).is_first_distinct()).then(pl.lit("duplicate"))
    )
    cells = rows.select("cellpath").unique().with_columns(concept_of_cell(pl.col("cellpath")))
    rows = rows.join(cells, on="cellpath").drop_nulls("concept")
    in_kg = rows.filter(pl.col("unit") == "kg").select("stay_id", "minute", charted=pl.lit(True)).unique()
    rows = rows.join(in_kg, on=["stay_id", "minute"], how="left")
    rows = rows.filter(pl.col("unit").ne_missing("lb") | pl.col("charted").is_null())  # the same weight in both
    rows = entered(rows, "intakeoutputentryoffset").with_columns(value="cellvaluenumeric")
    volume = pl.col("concept").is_in(["urine", "fluids"])
    clipped = rows.with_columns(
        value=pl.when(volume).then(pl.col("value").clip(upper_bound=ENTRY_MAX)).otherwise("value")
    )
    added = volume & pl.col("dropped").is_null() & (pl.col("value") >= 0).fill_null(False)
    at = ["stay_id", "minute", "known_minute", "concept"]
    summed = clipped.filter(added).group_by(at).agg(pl.col("value").sum())  # two catheters, two bags
    return pl.concat([as_events(summed), as_events(clipped.filter(~added))])


def concept_of_cell(cellpath: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
    """``concept`` (urine, fluids, weight or null) and ``unit`` of a flowsheet cell."""
    listed = {kind: cells["cell"].to_list() for (kind,), cells in words("eicu_urine_cells").group_by("match")}
    path = cellpath.str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    cell = path.str.strip_prefix(OUTPUT_CELLS)
    named = cell.is_in(listed["exact"]) | cell.str.contains("|".join(listed["regex"]))
    urine = path.str.starts_with(OUTPUT_CELLS) & named & ~cell.str.contains("|".join(listed["not"]))
    intake = path.str.strip_prefix(INTAKE_CELLS)
    parenteral = ~intake.str.starts_with("nutrition") | intake.str.contains(PARENTERAL_NUTRITION)
    vein = path.str.starts_with(INTAKE_CELLS) & parenteral & ~intake.str.contains(NOT_INTRAVENOUS)
    unit = pl.lit(None, pl.String)
    for ending, name in WEIGHT_CELLS.items():
        unit = pl.when(path.str.ends_with(ending)).then(pl.lit(name)).otherwise(unit)
    concept = (
        pl.when(urine).then(pl.lit("urine")).when(vein).then(pl.lit("fluids")).when(unit.is_not_null()).then(pl.lit("weight"))
    )  # fmt: skip
    return concept.cast(CONCEPT).alias("concept"), unit.alias("unit")
