"""``ehr synthesize``: raw files of a simulated hospital system. Starts without torch."""

from pathlib import Path
from typing import Literal

from datamodules.simulate import write
from experiments.files import console
from experiments.prepare import progress


def synthesize(
    out: str, system: Literal["MIMICIV", "EICU"] = "MIMICIV", stays: int = 2000, seed: int = 0, extra_rows: int = 0
) -> None:
    """Write raw files of a simulated hospital system, shaped as MIMIC-IV or eICU publish theirs.

    Args:
        out: New folder for the files.
        system: Whose layout, units and habits of charting.
        stays: Number of ICU stays.
        seed: The same seed writes the same files.
        extra_rows: Further rows in the largest table, to try out speed and memory.
    """
    with progress() as step:
        write(
            system,
            Path(out),
            stays,
            seed,
            extra_rows,
            progress=lambda done, all: step(f"{stays} simulated stays", done, all),
        )
    data = f"--data Synthetic{system} --data.root {out}"
    console.print(f"wrote {out}\nnext: ehr prepare {data}", soft_wrap=True)
