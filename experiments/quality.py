"""``quality.html`` of ``ehr prepare``: what was read, kept and dropped, how values are spread, and between hospitals. Without torch."""

from pathlib import Path

import numpy as np
import polars as pl

from datamodules.dictionary import BY_NAME, CONCEPT, NAMES
from datamodules.store import Store
from experiments.files import write_text
from experiments.html import figure, page, soft, table

MOST = 5_000_000  # events that quantiles are taken from, evenly spaced over all
FEWEST = 30  # values that a hospital must have of a variable to be compared
SHOWN = 40  # hospitals in a table, the largest
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


def sampled(store: Store) -> pl.DataFrame:
    """Events, or evenly spaced ones of very many: ``concept, value, minute, known, hospital_id, death_minute``."""
    step = max(len(store.minute) // MOST, 1)
    row = np.arange(0, len(store.minute), step)
    stay = np.searchsorted(store.offsets, row, side="right") - 1
    of_stay = store.stays.select("hospital_id", "death_minute")[stay]
    return of_stay.with_columns(
        concept=pl.Series(NAMES, dtype=CONCEPT).gather(store.concept[row].astype(np.uint32)),
        value=pl.Series(store.value[row]),
        minute=pl.Series(store.minute[row]),
        known=pl.Series(store.known[row]),
    )


def spread(events: pl.DataFrame) -> pl.DataFrame:
    """A row a concept: ``concept`` and the quantiles of its values, ``q1, q25, q50, q75, q99``."""
    quantiles = [pl.col("value").quantile(q, "linear").alias(f"q{round(100 * q)}") for q in QUANTILES]
    return events.group_by("concept").agg(quantiles).with_columns(pl.col("concept").cast(pl.String))


def between_hospitals(events: pl.DataFrame) -> pl.DataFrame:
    """How far hospitals differ in a variable, the one with the largest shift first.

    Returns:
        ``concept, hospitals`` (with at least 30 values)``, least`` and ``greatest`` median, and ``shift``: the standard deviation of
        their medians over the interquartile range of all values; 1 means that hospitals differ as much as patients do.
    """
    own = (
        events.group_by("concept", "hospital_id")
        .agg(pl.len(), median=pl.col("value").median())
        .filter(pl.col("len") >= FEWEST)
    )
    width = pl.col("value").quantile(0.75, "linear") - pl.col("value").quantile(0.25, "linear")
    of_all = events.group_by("concept").agg(width=width)
    of_hospitals = own.group_by("concept").agg(
        hospitals=pl.len(), least=pl.col("median").min(), greatest=pl.col("median").max(), sd=pl.col("median").std()
    )
    joined = of_hospitals.join(of_all, on="concept").filter((pl.col("hospitals") > 1) & (pl.col("width") > 0))
    return joined.select(
        pl.col("concept").cast(pl.String), "hospitals", "least", "greatest", shift=pl.col("sd") / pl.col("width")
    ).sort("shift", "concept", descending=[True, False])


def checks(events: pl.DataFrame, share: float) -> pl.DataFrame:
    """What could tell the future, and how often it occurs among events of which ``share`` are looked at: ``check, rows, means``."""
    late = events.filter(pl.col("known") > pl.col("minute"))
    hours = (late["known"] - late["minute"]).median()
    said = "none" if hours is None else f"median delay {float(hours) / 60:.1f} hours"  # type: ignore[arg-type]
    rows = [
        ("known before it happened", int((events["known"] < events["minute"]).sum()), "must be 0"),
        ("known later than it is dated", len(late), f"{said}; used only from then on"),
        (
            "dated after death",
            int((events["minute"] > events["death_minute"]).fill_null(False).sum()),
            "never seen: predictions end before",
        ),
        ("dated before admission to the ICU", int((events["minute"] < 0).sum()), "seen where the window reaches there"),
    ]
    remark = "" if share == 1 else f" (1 of {round(1 / share)} events was looked at)"
    return pl.DataFrame(
        [(check, n, means + remark) for check, n, means in rows], ["check", "rows", "what it means"], orient="row"
    )


def between_databases(events: pl.DataFrame, coverage: pl.DataFrame, other: Path) -> pl.DataFrame:
    """How far the values of another database, as ``ehr prepare --out`` wrote them, lie from those of this one.

    Args:
        events: of this one, as ``sampled``.
        coverage: of this one.
        other: folder of the other.

    Returns:
        ``concept, stays, other_stays`` (per cent that have it)``, median, other_median`` and ``shift``: the difference of the medians
        over the interquartile range of this one; the largest first, what only one has last.

    Raises:
        FileNotFoundError, ValueError: the folder holds no such files.
    """
    check_folder(other)
    try:
        rows = pl.scan_parquet(other / "events.parquet")
        count = rows.select(pl.len()).collect().item()
        theirs = rows.gather_every(max(count // MOST, 1)).select(pl.col("concept").cast(pl.String), "value").collect()
        their_coverage = pl.read_csv(other / "coverage.csv")
        parts = [
            spread(table).join(covered.select("concept", "stays_percent"), on="concept")
            for table, covered in ((events, coverage), (theirs, their_coverage))
        ]
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{other}: no files of `ehr prepare --out`, or damaged ({error}); write them again") from error
    own, their = (part.select("concept", "stays_percent", "q25", "q50", "q75") for part in parts)
    both = own.join(their, on="concept", how="full", coalesce=True, suffix="_other")
    width = pl.col("q75") - pl.col("q25")
    shift = pl.when(width > 0).then((pl.col("q50_other") - pl.col("q50")) / width)
    return both.select(
        "concept", pl.col("stays_percent").alias("stays"), pl.col("stays_percent_other").alias("other_stays"),
        pl.col("q50").alias("median"), pl.col("q50_other").alias("other_median"), shift=shift,
    ).sort(pl.col("shift").abs(), "concept", descending=[True, False], nulls_last=True)  # fmt: skip


def check_folder(other: Path) -> None:
    """Refuse a folder that ``ehr prepare --out`` has not written.

    Raises:
        FileNotFoundError: names what is missing.
    """
    for name in ("events.parquet", "coverage.csv"):
        if not (other / name).is_file():
            raise FileNotFoundError(f"no {name} in {other}: expected what `ehr prepare --out` writes; set --beside")


def write(folder: Path, name: str, store: Store, attrition: pl.DataFrame, other: Path | None = None) -> None:
    """Write ``quality.html``.

    Args:
        folder: where.
        name: of the hospital system.
        store: its events.
        attrition: who is left after each rule.
        other: folder that ``ehr prepare --out`` wrote of another database.
    """
    events, coverage = sampled(store), store.coverage()
    share = min(1.0, len(events) / max(len(store.minute), 1))
    values = spread(events)
    limits = pl.DataFrame(
        [(n, c.low, c.high) for n, c in BY_NAME.items()],
        {"concept": pl.String, "low": pl.Float64, "high": pl.Float64},
        orient="row",
    )
    whole = coverage.join(values, on="concept", how="left").join(
        limits, on="concept", how="left", maintain_order="left"
    )
    dropped = [n for n in coverage.columns[coverage.columns.index("stays_percent") + 1 :] if int(coverage[n].sum()) > 0]
    shown = whole.select(
        pl.col("concept").str.replace_all("_", " "), "unit", "rows", "events", pl.col("stays_percent").alias("% of stays"),
        *(pl.col(n).alias(n.replace("_", " ")) for n in dropped),
        pl.format("{} to {}", "low", "high").alias("plausible"),
        *(pl.col(f"q{round(100 * q)}").round_sig_figs(3).alias(f"{round(100 * q)} %") for q in QUANTILES),
    )  # fmt: skip
    drawn = whole.drop_nulls(["q50", "low", "high"])
    pictures: list[str] = []
    with figure(
        (8, 0.6 + 0.17 * max(len(drawn), 1)),
        pictures,
        "Values over their plausible range: 1 to 99 % (line), quartiles (bar), median",
    ) as into:
        axis = into.subplots()
        for k, record in enumerate(drawn.to_dicts()):
            low, width = record["low"], record["high"] - record["low"]
            q1, q25, q50, q75, q99 = ((record[f"q{round(100 * q)}"] - low) / width for q in QUANTILES)
            axis.plot([q1, q99], [k, k], color="0.6", linewidth=1)
            axis.plot([q25, q75], [k, k], color="C0", linewidth=5, solid_capstyle="butt")
            axis.plot(q50, k, "|", color="black", markersize=7)
        axis.set_yticks(range(len(drawn)), [n.replace("_", " ") for n in drawn["concept"]], fontsize=7)
        axis.set(xlim=(0, 1), ylim=(len(drawn), -1), xlabel="lower to upper limit")
        axis.spines[["top", "right"]].set_visible(False)
    units = store.units().with_columns(pl.col("unit").fill_null("none"))
    sections = [
        ("Who is left after each rule", table(attrition.rename({n: n.replace("_", " ") for n in attrition.columns}))),
        ("What was charted", table(shown) + "".join(pictures)),
        ("Units", table(units) + soft("A unit without a factor is not known, and its rows were dropped.")),
        ("Checks against the future", table(checks(events, share))),
    ]
    if store.stays["hospital_id"].n_unique() > 1:
        differ = between_hospitals(events).with_columns(pl.col("least", "greatest", "shift").round_sig_figs(3))
        filled = store.hospitals().sort("stays", "hospital_id", descending=[True, False]).head(SHOWN)
        yes = filled.with_columns(
            pl.when(pl.selectors.boolean()).then(pl.lit("yes")).otherwise(pl.lit("-")).name.keep()
        )
        told = soft(
            f"shift: standard deviation of hospitals' medians over the interquartile range of all values; hospitals with {FEWEST} values or more"
        )
        sections += [
            ("Between hospitals", table(differ) + told),
            (
                "Raw tables that hospitals fill",
                table(yes) + soft(f"The {SHOWN} largest.") * (store.hospitals().height > SHOWN),
            ),
        ]
    if other is not None:
        differ = between_databases(events, coverage, other).with_columns(
            pl.col("concept").str.replace_all("_", " "), pl.selectors.float().round_sig_figs(3)
        )
        beside = f"Beside {other.name}"
        headings = {
            "stays": "% of stays",
            "other_stays": f"% in {other.name}",
            "other_median": f"median in {other.name}",
        }
        told = "shift: difference of the medians over the interquartile range here; what a transfer has to bear"
        sections.append((beside, table(differ.rename(headings)) + soft(told)))
    kept, rows = int(coverage["events"].sum()), int(coverage["rows"].sum())
    cards = {
        "stays": f"{store.stays.height:,}",
        "rows read": f"{rows:,}",
        "events kept": f"{kept:,}",
        "in the cohort": f"{attrition['stays'][-1]:,}",
    }
    subject = "What was read of the raw tables, what was dropped and why, and how values are spread."
    write_text(folder / "quality.html", page(f"{name}: data quality", subject, cards, sections))
