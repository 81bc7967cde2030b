"""Tables for people, on a terminal of any width, in a pipe and in a log."""

from typing import Any, NamedTuple

import polars as pl
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from datamodules.dictionary import CONCEPTS
from experiments.metrics import METRICS, text

GAP = 2  # characters between columns
FEW = 30  # positives or negatives below which a score is too uncertain


def columns(results: dict[str, dict[str, Any]]) -> "list[Column]":
    """Results side by side: names of rows, and a column for each result.

    Args:
        results: as ``show`` takes them.
    """
    several = list(results.values())
    labels = ["n", *(of for of in ("stays", "patients") if any(r.get(f"n_{of}", r["n"]) != r["n"] for r in several))]
    labels = [*(["split"] if any("split" in r for r in several) else []), *labels, "events", "threshold"]
    if any("operating_point" in r for r in several):
        labels.append("operating point")
    shown = {
        name: metric.label
        for name, metric in METRICS.items()
        if metric.label is not None and (metric.everywhere or any(r[name]["value"] is not None for r in several))
    }
    labels += shown.values()
    shown_columns = [Column("", labels, max(map(len, labels)))]
    for name, result in results.items():
        facts = {
            "split": result.get("split"),
            "n": f"{result['n']:,}",
            "stays": _number(result.get("n_stays")),
            "patients": _number(result.get("n_patients")),
            "events": f"{result['n_positive']:,} ({result['n_positive'] / result['n']:.1%})".replace("%", " %"),
            "threshold": "none in this checkpoint" if result["threshold"] is None else f"{result['threshold']:.3g}",
            "operating point": result.get("operating_point"),
        }
        scores = [text(metric, result) for metric in shown]
        cells = [facts[label] or "-" for label in labels[: -len(scores)]]
        shown_columns.append(Column(name, [*cells, *scores], max(map(len, scores))))
    return shown_columns


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """Print results side by side: a column each, with a row for each metric.

    Args:
        results: by name, what ``metrics.score`` returns. It may also hold ``split``; ``operating_point``, how the
            threshold was chosen; and ``stopped``, a sentence on why training ended.
        console: where to print.
    """
    list(results.values())
    _print(columns(results), "95 % intervals: bootstrap over patients", console)
    for name, result in results.items():
        if "stopped" in result:
            console.print(Text(f"{name}: {result['stopped']}" if len(results) > 1 else result["stopped"]))
    few = [name for name, r in results.items() if min(r["n_positive"], r["n"] - r["n_positive"]) < FEW]
    if few:
        warning = f"fewer than {FEW} positives or negatives ({', '.join(few)}): these scores are too uncertain to mean anything"
        console.print(Text(warning, "yellow"))


def print_table(table: pl.DataFrame, title: str, console: Console) -> None:
    """Print a small table whole, numbers to the right; sentences wrap on a narrow terminal, numbers do not."""
    columns = []
    for series in table:
        number = series.dtype.is_numeric()
        cells = [_number(value) for value in series]
        widest = max(map(cell_len, cells), default=0)
        least = widest if number else min(widest, console.width // 3)
        columns.append(Column(series.name.replace("_", " "), cells, least, "right" if number else "left"))
    _print(columns, title, console)


def concepts() -> pl.DataFrame:
    """The concept list as a table: name, unit, plausible range, how an hour's values become one, source of the range."""
    return pl.DataFrame(CONCEPTS, schema=list(CONCEPTS[0]._fields), orient="row")


class Column(NamedTuple):
    """A column of a table of ``_print``, which is at least ``least`` wide, so that no number is broken."""

    heading: str
    cells: list[str]
    least: int
    justify: Any = "left"

    def widest(self) -> int:
        """Its width where nothing wraps."""
        return max(map(cell_len, [self.heading, *self.cells]))

    def narrowest(self, width: int) -> int:
        """The least width on a console of ``width`` at which no word is broken that takes less than two thirds of it."""
        words = [word for line in [self.heading, *self.cells] for word in line.split()]
        return max(self.least, min(max(map(cell_len, words), default=0), 2 * width // 3))


def _print(columns: list[Column], title: str, console: Console) -> None:
    """Print columns side by side; what the console is too narrow for follows below, beside the first column again."""
    console.print(Text(title, "bold"))
    width, (first, *rest) = console.width, columns
    while True:
        block = [first, *rest[:1]]
        for column in rest[1:]:
            if sum(c.narrowest(width) + GAP for c in [*block, column]) - GAP > width:
                break
            block.append(column)
        rest = rest[len(block) - 1 :]
        shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for column, characters in zip(block, _widths(block, width), strict=True):
            shown.add_column(Text(column.heading), justify=column.justify, width=characters, overflow="fold")
        for row in zip(*(column.cells for column in block), strict=True):
            shown.add_row(*map(Text, row))
        console.print(shown)
        console.print()
        if not rest:
            return


def _widths(block: list[Column], width: int) -> list[int]:
    """Widths that add up to at most ``width``: those that need least beyond their narrowest get it, the others share."""
    widths = [column.narrowest(width) for column in block]
    spare = width - sum(widths) - GAP * (len(block) - 1)
    for k, column in enumerate(block):  # two columns that are too wide together break long words
        less = min(max(-spare, 0), widths[k] - column.least)
        widths[k] -= less
        spare += less
    wanted = [max(column.widest() - narrow, 0) for column, narrow in zip(block, widths, strict=True)]
    for place, k in enumerate(sorted(range(len(block)), key=wanted.__getitem__)):
        more = min(wanted[k], max(spare, 0) // (len(block) - place))
        widths[k] += more
        spare -= more
    return widths


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
