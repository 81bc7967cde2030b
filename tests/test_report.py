"""Tables at every width, with and without a terminal: nothing is cut and no number is broken; and the log of what is printed."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from experiments import report
from experiments.files import UNLIMITED, _Console
from experiments.metrics import METRICS, text

WIDTHS = [40, 47, 60, 80, 120, UNLIMITED]
LABELS = [metric.label for metric in METRICS.values() if metric.label]
NAMES = ["SyntheticMIMICIV (source)", "SyntheticEICU zero-shot", "SyntheticEICU fine-tuned", "PhysioNet2012 test"]


def result(k: int, **more: Any) -> dict[str, Any]:
    """Every number is another one."""
    numbers = {
        name: {"value": 0.5 + k / 10 + j / 125, "low": 0.401 + k / 10 + j / 125, "high": 0.602 + k / 10 + j / 125}
        for j, name in enumerate(METRICS)
    }
    numbers["alerts_per_100_stays"] = {"value": 140.1 + k, "low": 130.2 + k, "high": 150.3 + k}
    return {**numbers, "n": 1600 + k, "n_positive": 250 + k, "threshold": 0.1 + k / 100, **more}


def printed(width: int, show: Callable[[Console], None], terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    show(console)
    lines = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, lines.splitlines())) <= width
    assert "…" not in lines
    return lines


def words(lines: str) -> str:
    return " ".join(lines.split())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_number_of_every_result_is_there(width: int, count: int) -> None:
    results = {name: result(k) for k, name in enumerate(NAMES[:count])}
    lines = printed(width, lambda console: report.show(results, console))
    for k, r in enumerate(results.values()):
        for name, metric in METRICS.items():
            assert (text(name, r) in lines) == (metric.label is not None), name
        for number in (f"{1600 + k:,}", f"{250 + k} ({(250 + k) / (1600 + k) * 100:.1f} %)", f"{0.1 + k / 100:.3g}"):
            assert number in lines
    labels = [line[:16].strip() for line in lines.splitlines()]
    assert [label for label in labels if label in LABELS] == LABELS * labels.count("AUROC")
    assert all(word in words(lines) for name in results for word in name.split())


def test_three_results_stand_side_by_side_on_eighty_columns() -> None:
    results = {name: result(k) for k, name in enumerate(NAMES[:3])}
    lines = printed(80, lambda console: report.show(results, console)).splitlines()
    (auroc,) = (line for line in lines if line.startswith("AUROC"))
    assert [cell.strip() for cell in auroc.split("  ")][-3:] == [
        "0.500 (0.401-0.602)",
        "0.600 (0.501-0.702)",
        "0.700 (0.601-0.802)",
    ]


def test_what_a_result_may_say_besides() -> None:
    stopped = "no better val_auroc for 10 epochs"
    results = {
        "source": result(0, split="val", operating_point="Youden", stopped=stopped, n_stays=900, n_patients=1600),
        "other": result(1, threshold=None, n_positive=29),
    }
    results["other"]["ppv"] = {"value": None, "low": None, "high": None}
    rows = {
        line[:17].strip(): line[17:].split()
        for line in printed(UNLIMITED, lambda console: report.show(results, console)).splitlines()
    }
    assert rows["split"] == ["val", "-"]
    assert rows["stays"] == ["900", "-"] and "patients" not in rows
    assert rows["threshold"] == ["0.1", "none", "in", "this", "checkpoint"]
    assert rows["operating point"] == ["Youden", "-"]
    assert rows["PPV"][-1] == "-" and "None" not in str(rows)
    lines = printed(60, lambda console: report.show(results, console))
    assert f"source: {stopped}" in words(lines)
    assert "fewer than 30 positives or negatives (other)" in words(lines)
    alone = printed(60, lambda console: report.show({"source": results["source"]}, console))
    assert stopped in alone and f"source: {stopped}" not in alone and "fewer" not in alone


ATTRITION = pl.DataFrame(
    {
        "rule": ["all ICU stays", "hospital outcome and time of death known, and the stay lasts to the prediction"],
        "stays": [1_234_567, 1_000_000],
        "patients": [234_567, 200_000],
        "hospital_deaths": [12_345, 10_000],
    }
)
DEFINITIONS = pl.DataFrame(
    {"definition": ["mimic_code", "norepinephrine_equivalent_change"]}
    | {f"suspected_mortality_{k}": [1_234_560 + k, 7_654_320 + k] for k in range(9)}
)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("table", [ATTRITION, DEFINITIONS], ids=["attrition", "definitions"])
def test_a_table_is_printed_whole(width: int, table: pl.DataFrame) -> None:
    lines = printed(width, lambda console: report.print_table(table, "a title", console))
    assert lines.startswith("a title\n")
    for column in table.columns[1:]:
        assert all(f"{value:,}" in lines.split() for value in table[column])
    for value in table[table.columns[0]]:
        parts = value.split() if width >= 60 else []
        assert all(part in lines for part in parts)
    assert all(word in lines for word in " ".join(table.columns[1:]).replace("_", " ").split())


def test_without_a_terminal_a_row_is_a_line() -> None:
    for table in (ATTRITION, DEFINITIONS):
        lines = printed(UNLIMITED, lambda console, t=table: report.print_table(t, "a title", console), terminal=False)  # type: ignore[misc]
        rows = [line for line in lines.splitlines() if line.strip()][3:]
        assert [row.split("  ")[0] for row in rows] == table[table.columns[0]].to_list()
        assert all(f"{v:,}" in row for row, values in zip(rows, table.rows(), strict=True) for v in values[1:])


def test_brackets_are_no_markup() -> None:
    table = pl.DataFrame({"unit": ["[red]", "[/]"], "rows": [1, 2]})
    assert "[red]" in printed(60, lambda console: report.print_table(table, "[bold]", console))


# ---- the console ----------------------------------------------------------------------------------------------------------

PRINT = "from experiments.files import console; print(console.width); console.print('word ' * 60)"


def test_width_is_that_of_the_terminal() -> None:
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 67, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    subprocess.run(
        [sys.executable, "-c", PRINT], stdin=child, stdout=child, env=environment | {"TERM": "xterm"}, check=True
    )
    os.close(child)
    lines = os.read(parent, 10_000).decode().splitlines()
    os.close(parent)
    assert lines[0] == "67"
    assert len(lines) > 4


def test_without_a_terminal_nothing_wraps() -> None:
    done = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2


def test_log_holds_what_is_printed_without_colour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console, path = _Console(width=50, force_terminal=True, color_system="standard"), tmp_path / "run.log"
    path.write_text("before\n")
    with console.logging_to(path):
        console.print("[yellow]few[/] positives in", tmp_path.name, highlight=False)
        console.print("a sentence that is longer than the console is wide, ä", soft_wrap=True)
        report.show({"source": result(0)}, console)
    console.print("after")
    shown, log = capsys.readouterr().out, path.read_text(encoding="utf-8")
    assert "\x1b[" in shown and "\x1b[" not in log
    assert log.startswith(
        f"before\nfew positives in {tmp_path.name}\na sentence that is longer than the console is wide, ä\n"
    )
    assert text("auroc", result(0)) in log
    assert "after" not in log


def test_a_quiet_console_logs_nothing(tmp_path: Path) -> None:
    console = _Console(quiet=True)
    with console.logging_to(tmp_path / "run.log"):
        console.print("one of several processes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk_ends_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    console = _Console(width=80)
    with console.logging_to(Path("/dev/full")):
        console.print("epoch 1")
    assert capsys.readouterr().out == "epoch 1\n"


def test_a_folder_that_is_gone_ends_no_training(tmp_path: Path) -> None:
    console = _Console(width=80)
    with console.logging_to(tmp_path / "gone" / "run.log"):
        console.print("epoch 1")


def test_logging_ends_with_an_error(tmp_path: Path) -> None:
    console = _Console(width=80)
    with pytest.raises(KeyboardInterrupt), console.logging_to(tmp_path / "run.log"):
        console.print("epoch 1")
        raise KeyboardInterrupt
    console.print("after")
    assert (tmp_path / "run.log").read_text() == "epoch 1\n"
