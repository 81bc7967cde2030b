"""``report.html``: what a run found, on one page that asks nothing of the network."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from datamodules.contract import STATISTICS
from datamodules.dictionary import BY_NAME
from datamodules.module import ICUDataModule
from datamodules.tasks import TASKS
from ehrmodels import ICUModule
from experiments import attribution, card, evidence, figures, metrics, report, run_directory
from experiments.files import console, write_text
from experiments.html import figure, page, soft, table, text
from experiments.metrics import METRICS

BESIDE = "Differences are paired: all rows see the same resamples of patients; a star marks an interval without 0."
FEW = f"Groups of which fewer than {evidence.SMALL} stays have, or do not have, the event have no scores. Ethnicity is not part of the data."
MOST = 20_000  # stays whose measurements the table of patients is made from
EXPLAINED = 150  # samples that the explanation is made from


def write(
    folder: Path,
    title: str,
    data: ICUDataModule,
    tables: dict[str, pl.DataFrame],
    results: dict[str, dict[str, Any]],
    model: ICUModule,
    chosen_on: pl.DataFrame | None = None,
    beside: pl.DataFrame | None = None,
) -> Path:
    """Write the page of a run, ``report.html``, and the cards of its model and data, ``card.md`` and ``data_card.md``.

    Args:
        folder: where; what ``config.yaml`` there says is part of the page.
        title: run and task.
        data: the hospital system that was scored last.
        tables: of each result with curves of its own, the predictions that it was scored from; the last one is the page's subject.
        results: name -> what ``metrics.score`` says and what is told besides, those without curves, too.
        model: that was scored last.
        chosen_on: predictions on which thresholds are chosen; None: there are none but those that are scored.
        beside: the comparison with other runs, for people.

    Returns:
        The file.
    """
    if console.quiet:  # one of several processes; the first writes it
        return folder / "report.html"
    name, predictions = next(reversed(tables.items()))
    result, task = results[name], asdict(data.task)
    rows = metrics.labelled(predictions)
    stays = data.cohort.stays().filter(pl.col("stay_id").is_in(rows["stay_id"].unique().implode()))
    groups = None
    both = 0 < result["n_positive"] < result["n"]
    sections: list[tuple[str, str]] = [("Scores", _scores(tables, results, title))]
    if beside is not None:
        sections.append(("Beside other runs", table(beside) + soft(BESIDE)))
    if both:
        sections.append(("Operating points", _points(rows, chosen_on, result, task)))
        sections.append(("Decision curve", _decision(rows, result)))
        if data.task.hourly and result["threshold"] is not None:
            sections.append(("Lead time and alarms", _alarms(rows, stays, data, result["threshold"])))
        groups = _subgroups(rows, stays, result["threshold"])
        sections.append(("Subgroups", table(groups) + soft(FEW)))
    sections.append(("Patients", _patients(rows, stays, data)))
    if len(data.rows(data.split)):
        sections.append(("What predictions rest on", _explanation(model, data)))
    cards = {
        "card.md": (f"Model card: {title}", card.of_model(model, data, results, groups)),
        "data_card.md": (f"Data card: {data.name}", card.of_data(data)),
    }
    for file, (head, about) in cards.items():
        write_text(folder / file, card.markdown(head, about))
    folded = [f"<details><summary>{file}</summary>{_card(about)}</details>" for file, (_, about) in cards.items()]
    sections.append(("Cards of model and data", "".join(folded)))
    sections.append(("Configuration", _configuration(folder)))
    subject = (
        f"{data.name}, {result.get('split', data.split)} split: {TASKS[data.task.name].text}. {run_directory.code()}"
    )
    numbers = {
        "AUROC": metrics.text("auroc", result), "AUPRC": metrics.text("auprc", result), "samples": f"{result['n']:,}",
        "with the event": f"{result['n_positive']:,} ({100 * result['n_positive'] / result['n']:.1f} %)",
    }  # fmt: skip
    write_text(folder / "report.html", page(title, subject, numbers, sections))
    return folder / "report.html"


# ---- parts of a page -------------------------------------------------------------------------------------------------------------


def _scores(tables: dict[str, pl.DataFrame], results: dict[str, dict[str, Any]], title: str) -> str:
    into: list[str] = []
    caption = "ROC and precision-recall curves with 95 % bands over patients, calibration, and risk by outcome"
    with figure((9.5, 9.5 + 0.5 * len(tables)), into, caption) as drawn:
        figures.draw_panels(tables, {name: results[name] for name in tables}, title, drawn)
    columns = report.columns(results)
    frame = pl.DataFrame({column.heading: column.cells for column in columns})
    stopped = "".join(soft(f"{name}: {r['stopped']}") for name, r in results.items() if "stopped" in r)
    return table(frame) + soft("95 % intervals: bootstrap over patients") + stopped + "".join(into)


def _points(rows: pl.DataFrame, chosen_on: pl.DataFrame | None, result: dict[str, Any], task: dict[str, Any]) -> str:
    choose = rows if chosen_on is None or chosen_on.is_empty() else metrics.labelled(chosen_on)
    own = (result.get("operating_point", "youden"), result["threshold"])
    where = "these very patients, which flatters them" if choose is rows else "the validation split"
    shown = table(evidence.operating_points(choose, rows, own, task))
    return shown + soft(f"Thresholds are chosen on {where}, but for the model's own; 95 % intervals over patients.")


def _decision(rows: pl.DataFrame, result: dict[str, Any]) -> str:
    share = result["n_positive"] / result["n"]
    most = min(max(4 * share, 0.1), 0.9)
    curve = evidence.net_benefit(rows, np.linspace(most / 200, most, 200).tolist())
    into: list[str] = []
    caption = (
        "Net benefit of alerting where the risk is at least a threshold, beside alerting for everybody and for nobody"
    )
    with figure((7, 3.6), into, caption) as drawn:
        axis = drawn.subplots()
        axis.plot(curve["threshold"], curve["model"], color="C0", label="model")
        axis.plot(curve["threshold"], curve["everybody"], color="0.5", label="everybody")
        axis.axhline(0, color="black", linewidth=0.8, label="nobody")
        if result["threshold"] is not None and result["threshold"] <= most:
            axis.axvline(result["threshold"], color="C3", linestyle="--", linewidth=1, label="the model's threshold")
        axis.set(ylim=(-0.25 * share, 1.1 * share), xlabel="threshold of risk", ylabel="net benefit")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    return "".join(into)


def _alarms(rows: pl.DataFrame, stays: pl.DataFrame, data: ICUDataModule, threshold: float) -> str:
    column = "sepsis_minute" if data.task.name == "sepsis_onset" else "death_minute"
    lead = evidence.lead_times(rows, stays.select("stay_id", event_minute=column), threshold)
    burden = evidence.alarm_burden(rows, threshold)
    told, foretold = len(lead), lead["lead"].drop_nulls()
    rows_of = [
        ("stays predicted before their event", f"{told:,}"),
        (
            f"with an alert in the {evidence.BEFORE} hours before",
            f"{len(foretold):,} ({100 * len(foretold) / max(told, 1):.0f} %)",
        ),
        *((f"with an alert at least {h} hours before", f"{int((foretold >= h).sum()):,}") for h in (1, 3, 6, 12, 24)),
    ]
    if len(foretold):
        low, middle, high = (foretold.quantile(q, "linear") for q in (0.25, 0.5, 0.75))
        rows_of.append(("hours from the first alert to the event", f"{middle:.1f} ({low:.1f} to {high:.1f})"))
    rows_of += [
        ("alerts per day of a stay", f"{burden['alerts_per_day']:.2f}"),
        ("the same, stays without the event", f"{burden['alerts_per_day_without_event']:.2f}"),
        ("stays without the event that have any alert", f"{100 * burden['alarmed']:.0f} %"),
    ]
    into: list[str] = []
    if len(foretold):
        with figure((7, 2.6), into, "Hours from the first alert to the event") as drawn:
            axis = drawn.subplots()
            axis.hist(foretold.to_numpy(), np.arange(0, evidence.BEFORE + 3, 3), color="C0")
            axis.set(xlabel="hours", ylabel="stays")
            axis.spines[["top", "right"]].set_visible(False)
    return table(pl.DataFrame(rows_of, ["at the model's threshold", "value"], orient="row")) + "".join(into)


def _card(about: card.Card) -> str:
    return "".join(
        f"<h3>{text(head)}</h3>"
        + "".join(f"<p>{text(part)}</p>" if isinstance(part, str) else table(part) for part in below)
        for head, below in about
    )


def _subgroups(rows: pl.DataFrame, stays: pl.DataFrame, threshold: float | None) -> pl.DataFrame:
    """Scores of subgroups, for people."""
    groups = evidence.subgroups(rows, stays, threshold)
    records = groups.to_dicts()
    shown: dict[str, list[Any]] = {
        "group": groups["group"].to_list(),
        "stays": [f"< {evidence.SMALL}" if n is None else f"{n:,}" for n in groups["stays"]],
        "events": [f"< {evidence.SMALL}" if n is None else f"{n:,}" for n in groups["events"]],
    }
    for metric in evidence.OF_GROUPS:
        shown[str(METRICS[metric].label)] = [metrics.cell(metric, record) for record in records]
    return pl.DataFrame(shown)


def _patients(rows: pl.DataFrame, stays: pl.DataFrame, data: ICUDataModule) -> str:
    last = rows.group_by("stay_id").agg(pl.col("minute").max(), event=pl.col("target").max() == 1)
    number = data.samples.with_row_index("row").select("row", "stay_id", "minute")
    last = last.join(number, on=["stay_id", "minute"]).join(stays, on="stay_id").sort("row").head(MOST)
    assert data.spec is not None
    chunks = np.array_split(last["row"].to_numpy(), len(last) // 2048 + 1)
    values = [
        data.batch(chunk.astype(np.int64), view="summary").summary[:, :, STATISTICS.index("last")].numpy()
        for chunk in chunks
    ]
    columns = np.concatenate(values).T
    measured = {
        f"{variable.replace('_', ' ')}, {BY_NAME[variable].unit}" if variable in BY_NAME else variable: column
        for variable, column in zip(data.spec.variables, columns, strict=True)
    }
    who = evidence.patients(last, last["event"].to_numpy(), measured)
    who = who.rename({"what": "", "without": "without the event", "with": "with the event"})
    kept = data.attrition.rename({name: name.replace("_", " ") for name in data.attrition.columns})
    return (
        "<h3>By outcome</h3>" + table(who) + soft("Medians and quartiles of the last value before the (last) prediction, or numbers and shares.")
        + "<h3>Who is left after each rule</h3>" + table(kept)
    )  # fmt: skip


def _explanation(model: ICUModule, data: ICUDataModule) -> str:
    """By the method that costs least, and the test of it; nothing of single patients."""
    method = [*attribution.methods(model)[1:2], "importance"][0]
    with torch.inference_mode():
        cohort = attribution.explained(model, data, attribution.drawn(data, EXPLAINED), [method])
        deletion, further = attribution.deletion(model, data, cohort, None)
    variables, unit = attribution.per_variable(cohort, model.spec), attribution.unit_of(model.spec)
    moved = (
        f"Without the variables that it puts first the {unit} move {float(np.mean(further[method])):.2f} further than without as many "
        "at random. ehr explain tests every method, on models that learned nothing, too, and shows single stays."
    )
    into: list[str] = []
    name = attribution.METHODS[method]
    with figure(
        (11, 5), into, f"Part of the {unit} by {name}, mean over {len(cohort.output)} samples; deletion test"
    ) as drawn:
        attribution.draw_cohort(variables, deletion, f"by {name}", unit, drawn)
    return "".join(into) + soft(moved)


def _configuration(folder: Path) -> str:
    parts = []
    for name in ("config.yaml", "environment.txt"):
        if (folder / name).exists():
            parts.append(f"<details><summary>{name}</summary><pre>{text((folder / name).read_text())}</pre></details>")
    return "".join(parts) or soft("No config.yaml beside this page.")
