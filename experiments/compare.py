"""``ehr compare``: runs side by side, and what one is better by on the same patients."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import yaml

from experiments import metrics, report, settings
from experiments.figures import figure
from experiments.files import console, write, write_json, write_parquet
from experiments.finetune import finetune
from experiments.metrics import KEY, METRICS, REPLICATES, Rows
from experiments.train import train

Split = Literal["test", "val", "all"]
Blend = Literal["rank", "logit"]
COMPARED = ("auroc", "auprc", "utility")


def compare(
    runs: list[str],
    out: str | None = None,
    reference: str | None = None,
    split: Split = "test",
    blend: Blend | None = None,
) -> pl.DataFrame:
    """Show runs side by side with intervals, and what each is better by than a reference on the same samples.

    Runs of one configuration with different seeds become one row: the mean over its seeds and their standard deviation (of single
    runs, not of the mean). Differences are paired. Where every patient has one row, that of AUROC is tested by DeLong's test, of
    several seeds as the contrast of the mean AUROCs of both rows. The others, and AUROC where a patient has several rows, have a
    bootstrap interval: patients are drawn 1,000 times, all seeds of both rows see the same draw, and what is kept of it is the
    mean over the seeds of the one less the mean over those of the other. So intervals tell of other patients, and the standard
    deviation of other seeds. A star marks an interval without 0. The utility of the 2019 challenge is shown where all runs have it,
    with the threshold of each.

    Args:
        runs: Run directories of train or finetune, or folders of evaluate; at least two.
        out: Folder for compare.csv and compare.png; default: nothing is written.
        reference: The run that the others are compared with, one of those named; default: the first.
        split: Which rows are compared: test, val, or all, for folders of evaluate.
        blend: Add the average of all named runs, of their ranks or logits: rank or logit; its predictions go to blend below --out.

    Returns:
        A row a configuration, as in ``compare.csv``.
    """
    if len(runs) < 2:
        raise ValueError(f"expected at least two runs to compare, found {len(runs)}: ehr compare RUN RUN")
    places = [Path(run).resolve() for run in runs]
    twice = [run for k, run in enumerate(runs) if places[k] in places[:k]]
    if twice:
        raise ValueError(f"{twice[0]} is named twice: name every run once")
    if blend is not None and out is None:
        raise ValueError("--blend writes predictions: give it a folder with --out")
    if out is not None and (Path(out) / "last.ckpt").exists():
        raise ValueError(f"{out} holds a training run; choose another --out")
    read = [Run.read(run) for run in runs]
    first = runs[0] if reference is None else reference
    if Path(first).resolve() not in places:
        raise ValueError(f"--reference {first} is none of the runs: name one of {', '.join(runs)}")
    groups = by_configuration(read)
    chosen = read[places.index(Path(first).resolve())]
    name = next(name for name, group in groups.items() if any(run is chosen for run in group))
    if blend is not None:
        check_samples(read, split)
        groups[f"blend ({blend})"] = [blended(read, split, blend)]
    table = contrasts(groups, name, split)
    show(table, name, f"{split} split" if split != "all" else "all rows")
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "compare.csv", table.write_csv().encode())
        draw({f"{split} split" if split != "all" else "": table}, folder / "compare.png")
        written = "compare.csv and compare.png"
        if blend is not None:
            (run,) = groups[f"blend ({blend})"]
            _write_blend(run, split, blend, runs, folder / "blend")
            written = "compare.csv, compare.png and blend/predictions.parquet"
        console.print(f"wrote {written} to {folder}", soft_wrap=True)
    return table


class Run(NamedTuple):
    """What there is of a run to compare.

    Attributes:
        name: as it was named.
        predictions: its table, of all splits.
        threshold: of its alerts.
        operating_point: how that was chosen.
        utility: whether the utility of the 2019 challenge was told of it.
        configurations: its own and that of the run that its checkpoint comes from, as far as they are there.
    """

    name: str
    predictions: pl.DataFrame
    threshold: float | None
    operating_point: str
    utility: bool
    configurations: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, name: str) -> "Run":
        """The run in a folder.

        Raises:
            ValueError: there is none, or none that has ended.
        """
        folder = Path(name)
        if not (folder / "predictions.parquet").is_file() or not (folder / "metrics.json").is_file():
            unfinished = (folder / "config.yaml").exists()
            raise ValueError(
                f"{name}: expected predictions.parquet and metrics.json of a run directory or of a folder of ehr evaluate, found "
                + ("a run that has not ended: finish it with --resume" if unfinished else "none; name another folder")
            )
        written = json.loads((folder / "metrics.json").read_text())
        results = [written] if "threshold" in written else [r for r in written.values() if isinstance(r, dict)]
        if not results or "threshold" not in results[0]:
            raise ValueError(f"{name} predicts no outcome: compare runs that do")
        return cls(
            name,
            pl.read_parquet(folder / "predictions.parquet"),
            results[0]["threshold"],
            results[0].get("operating_point", "youden").removesuffix(" of the source"),
            any((r.get("utility") or {}).get("value") is not None for r in results),
            tuple(_configurations(folder, written)),
        )

    @property
    def seed(self) -> Any:
        """Of the run that was trained first."""
        return self.configurations[-1].get("seed", 0) if self.configurations else None

    def rows(self, split: Split) -> pl.DataFrame:
        """Those of a split whose outcome is known.

        Raises:
            ValueError: there is none.
        """
        if split == "all" and self.configurations and self.configurations[0]:
            raise ValueError(
                f"--split all: {self.name} is a training run, whose val rows chose its model; give test or val"
            )
        table = self.predictions if split == "all" else self.predictions.filter(pl.col("split") == split)
        if table.is_empty():
            there = [s or "none" for s in self.predictions["split"].unique().sort()]
            hint = "all" if split != "all" and "val" not in there else "val"
            raise ValueError(
                f"{self.name} has no predictions of split {split}: found {', '.join(there)}; give --split {hint}"
            )
        return table.filter(pl.col("target").is_not_null() & pl.col("target").is_not_nan()).sort(KEY)


def _configurations(folder: Path, written: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    path, checkpoint = folder / "config.yaml", written.get("checkpoint")
    if path.exists():
        found.append(yaml.safe_load(path.read_text()))
        checkpoint = found[0].get("ckpt")
    elif checkpoint is not None:
        found.append({})  # of ``ehr evaluate``, which has no options that could differ on the same samples
    if checkpoint is not None:
        source = Path(checkpoint).parent
        if not (source / "config.yaml").exists():
            return []
        found += _configurations(source, {})
    return found


def by_configuration(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seeds alone together, under the name of the first of them."""
    short = [Path(run.name).resolve().name for run in runs]
    groups: dict[str, list[Run]] = {}
    for run, name in zip(runs, short, strict=True):
        for group in groups.values():
            if all(other.seed != run.seed for other in group) and _same(group[0], run):
                group.append(run)
                break
        else:
            groups[name if short.count(name) == 1 else run.name] = [run]
    return groups


def _same(one: Run, other: Run) -> bool:
    """Whether two runs have the same configuration but for seeds and the places of checkpoints."""
    if not one.configurations or len(one.configurations) != len(other.configurations):
        return False
    unequal: set[str] = set()
    for first, second in zip(one.configurations, other.configurations, strict=True):
        unequal |= set(settings.differences(first, second, finetune if "ckpt" in first else train))
    return unequal <= {"seed", "ckpt"}


def check_samples(runs: Sequence[Run], split: Split) -> None:
    """Refuse runs that were not scored on the same samples and labels.

    Raises:
        ValueError: names the two and what differs.
    """
    first, *others = ((run.name, run.rows(split).select(*KEY, "target")) for run in runs)
    for name, rows in others:
        if rows.select(KEY).equals(first[1].select(KEY)):
            unlike = int((rows["target"] != first[1]["target"]).sum())
            if unlike:
                raise ValueError(
                    f"{first[0]} and {name} give {unlike:,} of {len(rows):,} samples another outcome: compare runs of one task"
                )
            continue
        both = len(rows.join(first[1], on=KEY, how="semi"))
        raise ValueError(
            f"{first[0]} and {name} were not scored on the same samples: {len(first[1]):,} and {len(rows):,} of split {split}, "
            f"{both:,} of them in both; evaluate both on the same data, task and --data.seed"
        )


def contrasts(groups: dict[str, list[Run]], reference: str, split: Split) -> pl.DataFrame:
    """What ``compare`` returns.

    Args:
        groups: name of a row -> its runs, one a seed.
        reference: name of the row that the others are compared with.
        split: which rows count.
    """
    runs = [run for group in groups.values() for run in group]
    check_samples(runs, split)
    utility = all(run.utility for run in runs)
    names = [name for name in COMPARED if name != "utility" or utility]
    rows = {name: [run.rows(split) for run in group] for name, group in groups.items()}
    seeds = {
        name: np.array(
            [Rows(r, run.threshold, utility).drawn(names, REPLICATES) for r, run in zip(rows[name], group, strict=True)]
        )
        for name, group in groups.items()
    }  # (seeds, 1 + replicates, names)
    some = rows[reference][0]
    independent = metrics.one_row_a_patient(some)
    records = []
    for name, group in groups.items():
        mean = seeds[name].mean(0)
        record: dict[str, Any] = {
            "model": name,
            "seeds": ", ".join(str(run.seed) for run in group if run.seed is not None),
            "n": len(some),
            "events": int(some["target"].sum()),
        }
        value = metrics.with_intervals(names, mean)
        difference = metrics.with_intervals(names, mean - seeds[reference].mean(0))
        if independent:
            difference["auroc"] = metrics.delong(rows[reference], rows[name])
        for k, metric in enumerate(names):
            sd = float(seeds[name][:, 0, k].std(ddof=1)) if len(group) > 1 else None
            record |= {metric: value[metric]["value"], f"{metric}_low": value[metric]["low"]}
            record |= {f"{metric}_high": value[metric]["high"], f"{metric}_sd": sd}
            told = difference[metric] if name != reference else {}
            record |= {f"{metric}_difference": told.get("value")}
            record |= {f"{metric}_difference_{end}": told.get(end) for end in ("low", "high")}
            if metric == "auroc":
                record |= {"auroc_p": told.get("p"), "auroc_test": "DeLong" if independent else "bootstrap by patient"}
        records.append(record | {"runs": " ".join(run.name for run in group)})
    numbers = {name: pl.Float64 for name in records[0] if name.startswith(COMPARED) and name != "auroc_test"}
    return pl.DataFrame(records, schema_overrides=numbers)


def show(table: pl.DataFrame, reference: str, title: str) -> None:
    """Print what ``contrasts`` returns.

    Args:
        table: of ``contrasts``.
        reference: the row that the others are compared with.
        title: which rows these are.
    """
    tests = "paired bootstrap over patients"
    if table["auroc_test"][0] == "DeLong":
        tests = f"DeLong for differences of AUROC, {tests} for the others"
    counts = f"n = {table['n'][0]:,}, {table['events'][0]:,} events"
    report.print_table(readable(table, reference), f"{title}: {counts}; 95 % intervals: {tests}; * without 0", console)
    n, events = table["n"][0], table["events"][0]
    if min(events, n - events) < report.FEW:
        console.print(
            f"[yellow]fewer than {report.FEW} positives or negatives: too few to tell models apart[/]", highlight=False
        )


def readable(table: pl.DataFrame, reference: str) -> pl.DataFrame:
    """What ``contrasts`` returns, for people.

    Args:
        table: of ``contrasts``, or what was read of its CSV.
        reference: the row that the others are compared with.
    """
    names = [name for name in COMPARED if name in table.columns]
    shown: dict[str, list[Any]] = {"": table["model"].to_list()}
    if table["seeds"].str.len_chars().max():
        shown["seeds"] = [seeds or "-" for seeds in table["seeds"]]
    records = table.to_dicts()
    for name in names:
        label = str(METRICS[name].label)
        shown[label] = [metrics.cell(name, record) for record in records]
        if table[f"{name}_sd"].is_not_null().any():
            shown[f"{label} sd"] = ["-" if r[f"{name}_sd"] is None else f"{r[f'{name}_sd']:.3f}" for r in records]
    for name in names:
        shown[f"{METRICS[name].label} less {reference}"] = [signed(r, f"{name}_difference") for r in records]
        if name == "auroc" and table["auroc_p"].is_not_null().any():
            shown["p"] = ["-" if r["auroc_p"] is None else f"{r['auroc_p']:.2g}" for r in records]
    if "minutes" in table.columns:
        shown["minutes"] = ["-" if minutes is None else f"{minutes:.1f}" for minutes in table["minutes"]]
    return pl.DataFrame(shown)


def signed(record: dict[str, Any], column: str) -> str:
    """The difference in ``column`` of a row with its interval, and a star where that is without 0."""
    value, low, high = (record[column + end] for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    if low is None:
        return f"{value:+.3f}"
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})" + " *" * (low > 0 or high < 0)


def draw(tables: dict[str, pl.DataFrame], path: Path) -> None:
    """Values with intervals, and differences from the reference of each table, as a PNG: a row a metric of each table.

    Args:
        tables: title -> what ``contrasts`` returns.
        path: the PNG.
    """
    panels = [(title, table, name) for title, table in tables.items() for name in COMPARED if name in table.columns]
    heights = [0.9 + 0.32 * len(table) for _, table, _ in panels]
    with figure(path, (11, sum(heights) + 0.4)) as drawn:
        axes = drawn.subplots(len(panels), 2, squeeze=False, height_ratios=heights)
        for (title, table, name), (left, right) in zip(panels, axes, strict=True):
            label, reference = METRICS[name].label, table.filter(pl.col("auroc_difference").is_null())["model"][0]
            _forest(left, table, name, table[f"{name}_sd"])
            left.set_yticks(range(len(table)), table["model"].to_list())
            left.set_title(f"{title}: {label}" if title else label, fontsize=10)
            _forest(right, table, f"{name}_difference", None)
            right.set_yticks([])
            right.axvline(0, color="grey", linewidth=0.8)
            right.set_title(f"{label} less {reference}", fontsize=10)
            for axis in (left, right):
                axis.set_ylim(len(table) - 0.4, -0.6)
                axis.locator_params(axis="x", nbins=5)  # else their labels overlap
                axis.spines[["top", "right"]].set_visible(False)
        drawn.supxlabel(
            "bars: 95 % intervals over patients; grey: mean over seeds and one standard deviation", fontsize=8
        )


def _forest(axis: Any, table: pl.DataFrame, column: str, sd: pl.Series | None) -> None:
    """A point and its interval a row, the first above; filled where an interval of a difference is without 0."""
    for k, record in enumerate(table.to_dicts()):
        value, low, high = (record[column + end] for end in ("", "_low", "_high"))
        if value is None:
            continue
        if sd is not None and sd[k] is not None:
            axis.plot([value - sd[k], value + sd[k]], [k, k], color="0.75", linewidth=7, solid_capstyle="butt")
        if low is not None:
            axis.plot([low, high], [k, k], color=f"C{k % 10}", linewidth=1.6)
        clear = sd is not None or (low is not None and (low > 0 or high < 0))
        axis.plot(value, k, "o", color=f"C{k % 10}", markersize=5, markerfacecolor=None if clear else "white")


def joined(runs: Sequence[Run]) -> Run:
    """One run of the validation rows of the folds of a cross-validation, each of which has a threshold of its own."""
    if len(runs) == 1:
        return runs[0]
    rows = pl.concat([run.rows("val") for run in runs])
    return runs[0]._replace(name=" ".join(run.name for run in runs), predictions=rows, threshold=None, utility=False)


def blended(runs: Sequence[Run], split: Split, how: Blend) -> Run:
    """The average of runs; its threshold is chosen, as that of the first, on the val rows where all have the same."""
    parts = [split]
    if split != "val" and all((run.predictions["split"] == "val").any() for run in runs):
        try:
            check_samples(runs, "val")
            parts.append("val")
        except ValueError:
            pass
    averages = {part: _average([run.rows(part) for run in runs], how) for part in parts}
    point, threshold = runs[0].operating_point, None
    if "val" in averages:
        threshold = metrics.choose_threshold(averages["val"], point, metrics.CHALLENGE)
    predictions = pl.concat(averages.values()).unique(["stay_id", "minute"], maintain_order=True)
    return Run(f"blend ({how})", predictions, threshold, point, all(run.utility for run in runs))


def _average(tables: list[pl.DataFrame], how: Blend) -> pl.DataFrame:
    if how == "rank":
        position = (pl.col("probability").rank("average") - 0.5) / pl.len()
        means = [t.select(position)["probability"].to_numpy() for t in tables]
        return tables[0].with_columns(probability=np.mean(means, axis=0))
    least = 1e-12
    clipped = [np.clip(t["probability"].to_numpy(), least, 1 - least) for t in tables]
    logit = np.mean([np.log(p) - np.log1p(-p) for p in clipped], axis=0)
    return tables[0].with_columns(probability=1 / (1 + np.exp(-logit)))


def _write_blend(run: Run, split: Split, how: Blend, runs: list[str], folder: Path) -> None:
    """As ``ehr evaluate`` writes a folder, so that it can be compared in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(run.predictions, folder / "predictions.parquet")
    result = metrics.score(run.rows(split), run.threshold, task=metrics.CHALLENGE if run.utility else None)
    about = {"split": split, "operating_point": run.operating_point, "blend": how, "runs": runs}
    write_json({**result, **about}, folder / "metrics.json")
