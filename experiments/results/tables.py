"""Makes the tables of README.md and docs/ from the CSV files beside this one: ``python -m experiments.results.tables``."""

import re
from pathlib import Path

import polars as pl

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
PAGES = [README, *sorted((HERE.parents[1] / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """``text`` with every ``<!-- table: NAME --> ... <!-- end -->`` block made anew from ``NAME.csv``."""
    return BLOCK.sub(lambda block: block[1] + markdown(HERE / f"{block[2]}.csv") + block[3], text)


def markdown(path: Path) -> str:
    table = pl.read_csv(path, infer_schema=False)
    table = (benchmark(table) if "auroc_difference" in table.columns else table).fill_null("")
    rows = [table.columns, ["---"] * table.width, *table.rows()]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def benchmark(table: pl.DataFrame) -> pl.DataFrame:
    """A ``benchmark.csv`` of ``ehr benchmark`` for people; its columns of files (``runs``) are not kept here."""
    shown = [name for name in ("data", "split") if table[name].n_unique() > 1]
    columns = [pl.col(name) for name in (*shown, "model", "seeds")]
    for name in ("auroc", "auprc", "utility"):
        if name not in table.columns:
            continue
        label = name if name == "utility" else name.upper()
        value, low, high, sd = (_number(name + end) for end in ("", "_low", "_high", "_sd"))
        columns.append(pl.format("{} ({}-{})", value, low, high).alias(label))
        if table[f"{name}_sd"].is_not_null().any():
            columns.append(sd.alias(f"{label} sd"))
        change, least, most = (_number(f"{name}_difference{end}", sign=True) for end in ("", "_low", "_high"))
        clear = (pl.col(f"{name}_difference_low").cast(pl.Float64) > 0) | (
            pl.col(f"{name}_difference_high").cast(pl.Float64) < 0
        )
        star = pl.when(clear).then(pl.lit(" *")).otherwise(pl.lit(""))
        columns.append(pl.format("{} ({} to {}){}", change, least, most, star).alias(f"{label} less the reference"))
    minutes = pl.col("minutes").cast(pl.Float64).round(1).cast(pl.String)
    return table.select(*columns, minutes)


def _number(column: str, sign: bool = False) -> pl.Expr:
    number = pl.col(column).cast(pl.Float64)
    text = number.map_elements(lambda value: f"{value:{'+' if sign else ''}.3f}", pl.String)
    return text.alias(column)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
