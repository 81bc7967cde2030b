"""Makes the tables of README.md and docs/ from the CSV files beside this one: ``python -m experiments.results.tables``."""

import re
from pathlib import Path

import polars as pl

from experiments.compare import readable

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
PAGES = [README, *sorted((HERE.parents[1] / "docs").glob("*.md"))]
ELSEWHERE = {"gpu_summary": "not measured yet: `make gpu-check` writes it\n"}  # tables that not every machine can make
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """``text`` with every ``<!-- table: NAME --> ... <!-- end -->`` block made anew from ``NAME.csv``."""
    return BLOCK.sub(lambda block: block[1] + markdown(HERE / f"{block[2]}.csv") + block[3], text)


def markdown(path: Path) -> str:
    if path.stem in ELSEWHERE and not path.exists():
        return ELSEWHERE[path.stem]
    table = pl.read_csv(path, infer_schema=False)
    if "auroc_difference" in table.columns:  # of ``ehr benchmark``, without the column of its runs
        compared = pl.read_csv(path, schema_overrides={"seeds": pl.String})
        reference = compared.filter(pl.col("auroc_difference").is_null())["model"].item()
        table = readable(compared, reference).rename({"": "model"})
    table = table.fill_null("")
    rows = [table.columns, ["---"] * table.width, *table.rows()]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
