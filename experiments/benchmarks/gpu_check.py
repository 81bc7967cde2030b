"""`make gpu-check`: all that can only be checked and measured on a GPU, on that of this machine, within minutes.

Scans and convolutions beside a float64 loop, the throughput of training in every way, and trainings that are repeated, killed,
resumed, short of memory. What cannot be done here (no compiler, no network, no memory, no time) is said and left out; the exit
status is 1 only if a comparison fails. Results are written after every step, so that a run that is stopped leaves them.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import polars as pl
import torch
from rich.markup import escape
from rich.table import Table

from experiments.benchmarks import gpu_scan, gpu_train
from experiments.benchmarks.gpu_build import compiler, line, provide, say, version
from experiments.benchmarks.gpu_measure import NO_TIME, PATHS, Deadline, Row
from experiments.benchmarks.gpu_runs import Commands
from experiments.files import console, write_text

# beside it gpu_summary.csv, with a line for all measures of a thing
RESULT = Path(__file__).parents[1] / "results" / "gpu.csv"
SHORT = {  # how the summary says them
    gpu_scan.FORWARD: "{:.2g} ms forward",
    gpu_scan.BOTH: "{:.2g} ms with backward",
    gpu_train.SPEED: "{:,.0f} stays/s",
    gpu_train.WAITING: "waiting {:.0f} %",
    gpu_train.IDLE: "idle {:.0f} %",
    "peak MB": "{:,.0f} MB",
    "seconds to the first step": "first step {:.1f} s",
    "seconds": "{:.0f} s",
    "seconds after start-up": "{:.0f} s after start-up",
}
TITLES = ("", "measure", "kernel", "Triton", "PyTorch", "between", "limit", "target", "outcome")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every part; 1 if a comparison failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.gpu_check", description="checks and measurements on a GPU"
    )
    parser.add_argument(
        "--minutes", type=int, choices=(2, 10), default=10, help="how long it may take, without a build of the kernels"
    )
    parser.add_argument(
        "--kernels",
        type=Path,
        help="folder with CUDA kernels built elsewhere for this torch: wheels of mamba_ssm and causal_conv1d, or what they hold; "
        "default: those that are installed, else built here with --minutes 10",
    )
    parser.add_argument("--root", type=Path, help="folder with the files of PhysioNet 2012, to time whole commands")
    chosen = parser.parse_args(arguments)
    for folder in (chosen.kernels, chosen.root):
        if folder is not None and not folder.is_dir():
            parser.error(f"{folder} is no folder")
    if not torch.cuda.is_available():
        say(f"no CUDA device (torch {torch.__version__}): nothing was measured, nothing was written")
        return 0
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    folder = Path(os.environ.get("EHR_CACHE", ".cache")).resolve() / "gpu-check"
    device, nvcc = torch.device("cuda", torch.cuda.current_device()), compiler()
    gpu = torch.cuda.get_device_properties(device)
    facts = {
        "device": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
    }
    say(f"{', '.join(facts.values())}; nvcc: {version(nvcc)}")
    for sentence in provide(folder, nvcc if chosen.minutes > 2 else None, f"{gpu.major}.{gpu.minor}", chosen.kernels):
        say(sentence)
    deadline = Deadline(60 * chosen.minutes)
    kernels = gpu_scan.usable(device)
    facts["kernels"] = ", ".join(sorted(" ".join(k) for k in kernels)) or "none"
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as runs:
        rows = recorded(parts(device, kernels, folder, Path(runs), deadline, chosen.minutes, chosen.root), facts)
    return conclude(rows)


def parts(
    device: torch.device,
    kernels: set[tuple[str, str]],
    folder: Path,
    runs: Path,
    deadline: Deadline,
    minutes: int,
    root: Path | None,
) -> Iterator[tuple[str, Iterable[list[Row]]]]:
    """Titles and rows of what is measured, those that tell most first.

    Args:
        device: to be measured.
        kernels: operations and columns that can be used.
        folder: where simulated data are kept.
        runs: for run directories.
        deadline: of all.
        minutes: 2 or 10; with 2 there is less of everything.
        root: PhysioNet 2012.
    """
    long = minutes > 2
    shapes, repeats = (gpu_scan.SHAPES, 15) if long else (gpu_scan.SHAPES[:2], 5)
    title = "scan and convolution: errors against float64 over the largest value, median time, peak memory"
    yield title, gpu_scan.compare(device, kernels, deadline.part(0.25), shapes, repeats)
    try:
        stays = 8000 if long else 3000
        data = gpu_train.simulated(folder, stays)
    except Exception as error:
        yield "training", [[Row("training", f"left out: {line(error)}")]]
        return
    whole = {column: ("scan", column) in kernels for column in PATHS} | {"pytorch": True}
    whole["kernel"] &= ("convolution", "kernel") in kernels
    columns = [column for column in PATHS if whole[column]]
    waiting = gpu_train.settings(list(gpu_train.MODELS)[: 4 if long else 3], (256, 64, 1024) if long else (256, 64))
    title = f"training in bfloat16 on {len(data.rows('train')):,} simulated stays"
    yield title, gpu_train.train_all(data, device, waiting, columns, deadline.part(0.5), final=False)
    commands = Commands(Path(data.root), folder / "store", runs, deadline.part(0.7), columns[0])
    yield "commands on simulated stays", commands.rows()
    if root is not None:
        commands.deadline = deadline
        yield "commands on PhysioNet 2012", commands.end_to_end(root.resolve())
    yield f"{title}, continued", gpu_train.train_all(data, device, waiting, columns, deadline)


def recorded(titled: Iterable[tuple[str, Iterable[list[Row]]]], facts: dict[str, str]) -> list[Row]:
    """All rows; both tables are written after every step and shown after every part."""
    rows: list[Row] = []
    for title, part in titled:
        shown = len(rows)
        for more in part:
            rows += more
            write(rows, facts)
        if rows[shown:]:
            show(rows[shown:], title)
    return rows


def write(rows: Sequence[Row], facts: dict[str, str]) -> None:
    """``gpu.csv`` and ``gpu_summary.csv``; ``facts`` are columns that are the same everywhere."""
    table = pl.DataFrame([cells(r) for r in rows], schema=list(Row._fields), orient="row")
    write_text(RESULT, table.with_columns(**{name: pl.lit(fact) for name, fact in facts.items()}).write_csv())
    lines = [
        *summary(rows),
        {"what": "measured on", "besides": "; ".join(f"{name}: {fact}" for name, fact in facts.items())},
    ]
    write_text(RESULT.with_name("gpu_summary.csv"), pl.DataFrame(lines, infer_schema_length=None).write_csv())


def summary(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One line for all that was measured of one thing, in words; of errors only how many are within their limits, and in the
    last line what there was no time for."""
    lines: dict[str, dict[str, list[str]]] = {}
    for row in (r for r in rows if r.measure != NO_TIME):
        said = lines.setdefault(row.what, {name: [] for name in (*PATHS, "besides")})
        if row.measure in SHORT:
            for column in (*PATHS, "between"):
                if (value := getattr(row, column)) is not None:
                    said[column if column in PATHS else "besides"].append(SHORT[row.measure].format(value))
            if row.target and row.measure not in gpu_train.TARGETS:  # which are the same everywhere
                said["besides"].append(f"target: {row.target}")
        elif row.measure.startswith("graphs compiled"):
            most = max((value for value in row[2:5] if value is not None), default=0)
            said["besides"] += [f"{row.measure}: {most:.0f}"] if most else []
        elif row.measure == gpu_train.LOSS:
            said["besides"] += ["the loss does not fall"] if row.outcome == "FAILS" else []
        elif row.measure.startswith("error of"):
            continue
        else:
            values = [f"{row.measure}: {value:.2g}" for value in row[2:6] if value is not None] or [row.measure]
            said["besides"].append(" ".join(filter(None, [*values, row.target and f"({row.target})", row.outcome])))
    for what, said in lines.items():
        judged = [r.outcome for r in rows if r.what == what and r.measure.startswith("error of")]
        if judged:
            said["besides"].append(f"{judged.count('ok')} of {len(judged)} errors within their limits")
    if late := sum(r.measure == NO_TIME for r in rows):
        lines[NO_TIME] = {name: [] for name in PATHS} | {"besides": [f"{late} measurements"]}
    return [
        {"what": what} | {name: "; ".join(words).replace("|", "/") for name, words in said.items()}
        for what, said in lines.items()
    ]


def conclude(rows: Sequence[Row]) -> int:
    """Say how many comparisons failed; 1 if any did, else 0."""
    judged = [r.outcome for r in rows if r.outcome]
    failed = sum(outcome != "ok" for outcome in judged)
    late = sum(r.measure == NO_TIME for r in rows)
    say(f"{failed} of {len(judged)} comparisons failed; {late} were left out for want of time; wrote {RESULT}")
    return int(failed > 0)


def show(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title)
    for heading in TITLES:
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(escape, cells(row)))
    console.print(table)


def cells(row: Row) -> list[str]:
    """Numbers with three digits, or whole."""
    return ["" if v is None else v if isinstance(v, str) else f"{v:.3g}" if abs(v) < 1000 else f"{v:.0f}" for v in row]


if __name__ == "__main__":
    sys.exit(main())
