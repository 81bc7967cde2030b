"""``card.md`` and ``data_card.md``: what a model and its data are, on whom it was trained and measured, what neither is for.

Both are parts of ``report.html``, too.

References:

1. Mitchell et al., Model cards for model reporting, 2019, arXiv:1810.03993; Gebru et al., Datasheets for datasets, 2021, arXiv:1803.09010.
2. Collins et al., TRIPOD+AI statement, 2024, doi:10.1136/bmj-2023-078378: the numbers of items.
"""

from typing import Any

import polars as pl

from datamodules.module import ICUDataModule
from datamodules.tasks import TASKS
from ehrmodels import ICUModule
from experiments import metrics, run_directory
from experiments.metrics import METRICS

Part = str | pl.DataFrame  # a paragraph or a table
Card = list[tuple[str, list[Part]]]  # headings and what is below them

CREDENTIALED = "PhysioNet Credentialed Health Data License 1.5.0 (of the open demo: Open Database License 1.0)"
LICENCES = {
    "MIMICIV": CREDENTIALED,
    "EICU": CREDENTIALED,
    "PhysioNet2012": "Open Data Commons Attribution License 1.0",
    "PhysioNet2019": "Creative Commons Attribution 4.0",
    "SyntheticMIMICIV": "none, simulated",
    "SyntheticEICU": "none, simulated",
}
YOURS = "to be written by you"


def of_model(
    model: ICUModule, data: ICUDataModule, results: dict[str, dict[str, Any]], groups: pl.DataFrame | None
) -> Card:
    """The card of a model.

    Args:
        model: with layers.
        data: the hospital system that it was scored on last.
        results: name -> what ``metrics.score`` says.
        groups: table of subgroups for people.
    """
    spec, task = model.spec, data.task
    label = TASKS[task.name]
    arguments = ", ".join(f"{name} {value}" for name, value in sorted(model.hparams.items()) if value is not None)
    parameters = sum(p.numel() for p in model.parameters())
    kind = type(model)
    trained_on = [str(t.get("population")) for t in model.facts.get("trained_on", [])]
    when = (
        f"at the end of every hour from hour {task.hours} on, from the last {spec.window} hours"
        if task.hourly
        else (f"once, after the first {task.hours} hours in the ICU")
    )
    samples = _samples(data)
    names = (
        "auroc",
        "auprc",
        "brier",
        "ece",
        "slope",
        "intercept",
        "sensitivity",
        "specificity",
        "ppv",
        "npv",
        "alerts_per_100_stays",
    )
    scores = pl.DataFrame({
        "": [str(METRICS[name].label) for name in names],
        **{name: [metrics.text(metric, result) for metric in names] for name, result in results.items()},
    })  # fmt: skip
    predictors = pl.DataFrame({"variable": [v.replace("_", " ") for v in spec.variables], "unit": spec.units})
    septic = " with Sepsis-3 known before the prediction" if task.sepsis else ""
    parts: Card = [
        ("Model", [
            f"{kind.__name__} ({kind.__module__}), {parameters:,} parameters; {arguments}. {run_directory.code()}.",
            f"Trained on {', '.join(trained_on) or 'unknown data'}; " + (
                f"probabilities recalibrated by {model.calibration.method} on {model.calibration.patients:,} patients."
                if model.calibration else "probabilities are as trained."
            ),
        ]),
        ("Intended use", [
            "Research on prediction from ICU records. It is no medical device: nobody has shown that acting on its predictions helps patients, "
            "and it must not decide on the care of any.",
            f"It was not measured on patients younger than {data.min_age:g} years, in other hospital systems than those below, or with other "  # type: ignore[attr-defined]
            "habits of charting; measure it, and recalibrate it, on your own patients first.",
        ]),
        ("Data", [f"{data.name}: {data.store.stays.height:,} ICU stays; see data_card.md. Licence: {_licence(data)}.", data.attrition]),
        ("Outcome", [f"{label.text}; predicted {when}, of ICU stays{septic}. Patients, not stays, are divided into splits ({data.split_hash()})."]),
        ("Sample size", [samples]),
        ("Predictors", [
            f"{len(spec.variables)} variables that were known before the prediction, and {', '.join(spec.statics[:12])}"
            + (f" and {len(spec.statics) - 12} more about what was measured before" if len(spec.statics) > 12 else "")
            + ". What was not measured stays missing: networks see that it is, trees have a branch for it; nothing is imputed from later values.",
            predictors,
        ]),
        ("Performance", ["95 % intervals: bootstrap over patients; a threshold is never chosen on the patients that it is measured on.", scores]),
    ]  # fmt: skip
    if groups is not None:
        parts.append(
            (
                "Fairness",
                ["Scores of subgroups; small ones are not told, and ethnicity is not part of the data.", groups],
            )
        )
    parts.append(("Limits", [
        "Intervals tell of other patients of the same hospitals, not of other hospitals or years. Labels are as charted. A risk that led to "
        "treatment is not a risk without treatment: what is predicted is the outcome under the care that was given.",
    ]))  # fmt: skip
    parts.append(("TRIPOD+AI", [tripod()]))
    return parts


def of_data(data: ICUDataModule) -> Card:
    """The card of a hospital system's data as a task uses them.

    Args:
        data: set up.
    """
    stays, coverage = data.store.stays, data.store.coverage()
    lost = coverage.columns[coverage.columns.index("stays_percent") + 1 :]
    reasons = [f"{int(coverage[name].sum()):,} {name.replace('_', ' ')}" for name in lost if int(coverage[name].sum())]
    known = stays["hospital_death"].drop_nulls()
    age, male = stays["age"].median(), stays["sex"].mean()
    who = [
        f"{stays.height:,} ICU stays of {stays['patient_id'].n_unique():,} patients in {stays['hospital_id'].n_unique():,} hospitals",
        "age unknown" if age is None else f"median age {float(age):.0f} years",  # type: ignore[arg-type]
        "sex unknown" if male is None else f"{100 * float(male):.0f} % men",  # type: ignore[arg-type]
        f"{100 * float(known.cast(pl.Float64).mean() or 0):.1f} % of the {len(known):,} stays with a known outcome ended in death in hospital"  # type: ignore[arg-type]
        if len(known)
        else "outcomes unknown",
    ]
    charted = coverage.filter(pl.col("events") > 0).select(
        pl.col("concept").str.replace_all("_", " ").alias("variable"), "unit", "events", pl.col("stays_percent").alias("% of stays"),
    )  # fmt: skip
    return [
        ("Source", [f"{data.name}, extracted from the publisher's files by this program. Licence: {_licence(data)}."]),
        ("Who is in it", [f"{', '.join(who)}. Ethnicity is not read."]),
        ("Who is used", ["Rules of inclusion, in this order; outcomes do not depend on features.", data.attrition]),
        ("How it is divided", [f"By {data.split_by}, never a patient in two splits; hash {data.split_hash()}.", _samples(data)]),
        ("What was charted", [
            f"{int(coverage['rows'].sum()):,} rows were read and {int(coverage['events'].sum()):,} kept; "
            f"left out: {', '.join(reasons) or 'none'}. `ehr prepare --out` shows which, in quality.html.", charted,
        ]),
        ("What is not in it", [
            "What was not charted: missing values are not imputed, and that something was measured tells of the patient's state. Values "
            "are as charted, within wide plausible limits. Care as it was given in these hospitals in those years.",
        ]),
        ("What it may be used for", [
            "What its licence and your agreement with its publisher allow. Rows of single patients stay on the machine that may hold them; "
            "this card, the reports and what is sent to trackers hold none.",
        ]),
    ]  # fmt: skip


def _licence(data: ICUDataModule) -> str:
    return LICENCES.get(data.name, "yours to say")


def _samples(data: ICUDataModule) -> pl.DataFrame:
    """Stays, patients, samples and events of each split."""
    return (
        data.samples.group_by("split").agg(
            stays=pl.col("stay_id").n_unique(), patients=pl.col("patient_id").n_unique(), samples=pl.len(),
            events=pl.col("target").cast(pl.Float64).sum().cast(pl.Int64),
        ).sort("split")
    )  # fmt: skip


def tripod() -> pl.DataFrame:
    """Items of the statement [2] that this card fills, and those that only an author can."""
    items = [
        ("1 title, 2 abstract, 3 background, 4 objectives", YOURS), ("5 data", "Data, Sample size; data_card.md"), ("6 participants", "Data, Outcome"),
        ("7 data preparation", "docs/data.md"), ("8 outcome", "Outcome"), ("9 predictors", "Predictors"), ("10 sample size", "Sample size"),
        ("11 missing data", "Predictors"), ("12 analytical methods", "Model, Performance; config.yaml"), ("13 class imbalance", "Model (pos_weight)"),
        ("14 fairness", "Fairness"), ("15 model output", "Performance (threshold and how it was chosen)"),
        ("16 training versus evaluation", "Sample size"), ("17 ethical approval", YOURS), ("18 open science", "Model (code version), Data (licence)"),
        ("19 patient and public involvement", YOURS), ("20 participants (results)", "report.html: Patients"), ("21 model development", "Sample size"),
        ("22 model specification", "best.ckpt, config.yaml"), ("23 model performance", "Performance, Fairness; report.html"),
        ("24 model updating", "Model (recalibration); docs/transfer.md"), ("25 interpretation", YOURS), ("26 limitations", "Limits"), ("27 usability", "Intended use"),
    ]  # fmt: skip
    return pl.DataFrame(items, ["item", "where"], orient="row")


def markdown(title: str, parts: Card) -> str:
    """A card as Markdown."""
    lines = [f"# {title}", ""]
    for head, below in parts:
        lines += [f"## {head}", ""]
        for part in below:
            if isinstance(part, str):
                lines += [part, ""]
                continue
            lines.append("| " + " | ".join(part.columns) + " |")
            lines.append("| " + " | ".join(["---"] * part.width) + " |")
            lines += [
                "| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |" for row in part.iter_rows()
            ]
            lines.append("")
    return "\n".join(lines)
