"""The blocks of docs/python.md run, one after another, as a reader would type them."""

import logging
import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[1] / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)


@pytest.mark.filterwarnings("ignore")
def test_every_block_for_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)
    names: dict[str, object] = {"__name__": "notebook"}
    assert len(BLOCKS) >= 7
    for block in BLOCKS:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    assert (tmp_path / "runs" / "notebook" / "finetune-SyntheticEICU" / "report.html").exists()
    assert 0 < names["probability"].max() < 1  # type: ignore[attr-defined]
    assert type(names["again"]).__name__ == "GRU"
    assert len(names["study"].trials) == 2  # type: ignore[attr-defined]
    assert names["scores"]["n"] > 100  # type: ignore[index]
