"""How far a model is the same in every hospital: its scores in each, pooled with random effects, and a forest plot.

References:

1. DerSimonian, Laird, Meta-analysis in clinical trials, 1986: the variance between hospitals.
2. Knapp, Hartung, Improved tests for a random effects meta-regression with a single covariate, 2003: the interval of the mean,
   here never narrower than without.
3. Higgins, Thompson, Spiegelhalter, A re-evaluation of random-effects meta-analysis, 2009: the interval for a further hospital.
4. Snell, Ensor, Debray, Moons, Riley, Meta-analysis of prediction model performance across multiple studies, 2018,
   doi:10.1177/0962280217705678: areas on the scale of the logit.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import track

from experiments import report
from experiments.figures import figure
from experiments.files import console, write
from experiments.metrics import METRICS, REPLICATES, Rows, labelled

POOLED = ("auroc", "slope", "intercept")
FEWEST = 3  # hospitals whose scores can be pooled, and a further one foreseen


class Pool(NamedTuple):
    """Scores of several hospitals as one.

    Attributes:
        hospitals: how many.
        value: the mean over hospitals.
        low: its 95 % interval.
        high: the same.
        next_low: where a further hospital lies with a probability of 95 %.
        next_high: the same.
        between: standard deviation between hospitals, of AUROC on the logit.
        share: of the variance that is between hospitals and not chance, I squared.
    """

    hospitals: int
    value: float
    low: float
    high: float
    next_low: float
    next_high: float
    between: float
    share: float


def pooled(values: np.ndarray, errors: np.ndarray) -> Pool:
    """Values of hospitals (K,) with standard errors (K,), pooled with random effects; at least three."""
    from scipy.stats import t

    k, weight = len(values), 1 / errors**2
    mean = weight @ values / weight.sum()
    q = weight @ (values - mean) ** 2
    between = max(0.0, (q - (k - 1)) / (weight.sum() - weight @ weight / weight.sum()))
    weight = 1 / (errors**2 + between)
    mean = weight @ values / weight.sum()
    spread = weight @ (values - mean) ** 2 / (k - 1)
    error = np.sqrt(max(1.0, spread) / weight.sum())
    half, further = t.ppf(0.975, k - 1) * error, t.ppf(0.975, k - 2) * np.sqrt(between + error**2)
    ends = mean - half, mean + half, mean - further, mean + further
    return Pool(k, *map(float, (mean, *ends, np.sqrt(between), max(0.0, 1 - (k - 1) / q) if q else 0.0)))


def by_hospital(predictions: pl.DataFrame, hospital: pl.DataFrame, least: int) -> pl.DataFrame:
    """A row a hospital, the one with most events first.

    Args:
        predictions: as ``metrics.score`` takes them.
        hospital: ``stay_id, hospital_id``.
        least: stays with an event, and without one, that a hospital must have; the others have no scores.

    Returns:
        ``hospital, n, stays, events`` (stays with one)``, scored``, and of each of AUROC, slope, intercept and ECE the value and its
        standard error over resampled patients; null where it has none.
    """
    parts = (
        labelled(predictions)
        .join(hospital.select("stay_id", "hospital_id"), on="stay_id", how="left")
        .partition_by("hospital_id", as_dict=True)
    )
    records, names = [], (*POOLED, "ece")
    for (name,), rows in track(
        parts.items(),
        "hospitals",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty() or console.quiet,
    ):
        stays = rows.group_by("stay_id").agg(pl.col("target").max())["target"]
        events = int(stays.sum())
        scored = min(events, len(stays) - events) >= least
        record = {"hospital": name, "n": len(rows), "stays": len(stays), "events": events, "scored": scored}
        drawn = Rows(rows, None).drawn(names, REPLICATES) if scored else np.full((3, len(names)), np.nan)
        for k, metric in enumerate(names):
            resampled = drawn[1:, k][np.isfinite(drawn[1:, k])]
            record |= {metric: _number(drawn[0, k])}
            record |= {f"{metric}_error": _number(resampled.std(ddof=1)) if len(resampled) > 1 else None}
        records.append(record)
    scores = {name: pl.Float64 for metric in names for name in (metric, f"{metric}_error")}
    table = pl.DataFrame(records, schema_overrides=scores)
    return table.sort("events", "stays", "hospital", descending=[True, True, False])


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def pools(table: pl.DataFrame) -> dict[str, Pool]:
    """AUROC, slope and intercept of ``by_hospital``, pooled, as far as three hospitals have them with an error above 0."""
    result = {}
    for name in POOLED:
        rows = table.filter(pl.col(f"{name}_error") > 0)
        value, error = rows[name].to_numpy(), rows[f"{name}_error"].to_numpy()
        if name == "auroc":  # of 0 and 1 the logit is no number
            inside = (value > 0) & (value < 1)
            value, error = value[inside], error[inside]
            value, error = np.log(value / (1 - value)), error / (value * (1 - value))
        if len(value) < FEWEST:
            continue
        pool = pooled(value, error)
        if name == "auroc":
            pool = pool._replace(**{end: 1 / (1 + np.exp(-getattr(pool, end))) for end in Pool._fields[1:6]})
        result[name] = pool
    return result


def tell(predictions: pl.DataFrame, hospital: pl.DataFrame, least: int, folder: Path, title: str) -> None:
    """Print and write what there is by hospital: ``hospitals.csv``, ``hospitals.png``.

    Args:
        predictions: as ``metrics.score`` takes them.
        hospital: ``stay_id, hospital_id``.
        least: see ``by_hospital``.
        folder: where to write.
        title: of the picture.

    Raises:
        ValueError: fewer than three hospitals have so many.
    """
    table = by_hospital(predictions, hospital, least)
    scored, others = table.filter("scored"), table.filter(~pl.col("scored"))
    if len(scored) < FEWEST:
        raise ValueError(
            f"--by_hospital {least}: {len(scored)} of {len(table)} hospitals have at least {least} stays with the event and as many "
            f"without, and {FEWEST} are needed; lower it, or score more stays (--data.split all)"
        )
    pool = pools(scored)
    write(folder / "hospitals.csv", table.write_csv().encode())
    rows = []
    for name, of in pool.items():
        value = scored[name].drop_nulls()
        digits = METRICS[name].digits
        span = [f"{value.quantile(q, 'linear'):.{digits}f}" for q in (0, 0.25, 0.5, 0.75, 1)]
        rows.append({
            "": METRICS[name].label, "hospitals": of.hospitals,
            "mean (95 %)": f"{of.value:.{digits}f} ({of.low:.{digits}f} to {of.high:.{digits}f})",
            "a further one (95 %)": f"{of.next_low:.{digits}f} to {of.next_high:.{digits}f}",
            "least": span[0], "quartiles": " ".join(span[1:4]), "most": span[4], "I2": f"{100 * of.share:.0f} %",
        })  # fmt: skip
    report.print_table(pl.DataFrame(rows), f"{len(scored)} hospitals, random effects", console)
    if len(others):
        console.print(
            f"{len(others)} of {len(table)} hospitals have fewer than {least} stays with the event, or without: {others['stays'].sum():,} of "
            f"{table['stays'].sum():,} stays are not in these rows",
            soft_wrap=True,
        )
    draw(scored, pool, folder / "hospitals.png", title)


def draw(table: pl.DataFrame, pool: dict[str, Pool], path: Path, title: str) -> None:
    """A forest plot: a row a hospital, the pooled mean below with what a further hospital may be, as a PNG."""
    height = len(table) + 1
    with figure(path, (11, 1.6 + 0.2 * height)) as drawn:
        axes = drawn.subplots(1, len(pool), sharey=True, squeeze=False)[0]
        for axis, (name, of) in zip(axes, pool.items(), strict=True):
            value, error = table[name].to_numpy(), 1.96 * table[f"{name}_error"].fill_null(float("nan")).to_numpy()
            low, high = value - error, value + error
            if name == "auroc":
                low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
            y = np.arange(len(table))
            axis.hlines(y, low, high, color="0.6", linewidth=1.2)
            axis.scatter(
                value,
                y,
                s=8 + 60 * table["events"].to_numpy() / table["events"].max(),
                marker="s",
                color="C0",
                zorder=3,
            )
            axis.plot([of.next_low, of.next_high], [height] * 2, color="C3", linewidth=1.2)
            axis.fill([of.low, of.value, of.high, of.value], height + np.array([0, -0.4, 0, 0.4]), color="C3")
            axis.axvline(
                {"auroc": of.value, "slope": 1.0, "intercept": 0.0}[name], color="grey", linewidth=0.8, linestyle=":"
            )
            axis.set_title(str(METRICS[name].label), fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        names = [f"{row['hospital']} ({row['events']}/{row['stays']})" for row in table.to_dicts()]
        axes[0].set_yticks([*range(len(table)), height], [*names, "random effects"], fontsize=7)
        axes[0].set_ylim(height + 0.8, -0.8)
        drawn.suptitle(title, fontsize=10)
        drawn.supxlabel(
            "hospital (stays with the event / all); bars: 95 % over patients; red: mean with its interval, and a further hospital",
            fontsize=8,
        )
