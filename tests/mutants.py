"""Do the tests notice? One wrong line at a time in a copy of the project, and the tests of that part: `make check-mutants`.

Prints a line a mutant, "caught" or "SURVIVED", and ends with status 1 where one survived or no longer applies.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSV = "dictionary/{}.csv"
MIMICIV, EICU = "hospitals/mimiciv/__init__.py", "hospitals/eicu/__init__.py"

# file of datamodules, what it says, what the mutant says, tests that should notice
MUTANTS = [
    # items, units, ranges
    (CSV.format("mimiciv"), "labevents,50983,sodium,", "labevents,50971,sodium,", "truth"),
    (CSV.format("mimiciv"), "labevents,51301,wbc,,,\n", "", "truth"),
    (CSV.format("mimiciv"), "labevents,50817,sao2,,arterial,", "labevents,50817,sao2,,,", "mimiciv"),
    (CSV.format("mimiciv"), "labevents,50802,base_excess,,arterial,", "labevents,50802,base_excess,,,", "mimiciv"),
    (CSV.format("eicu"), "lab,total bilirubin,bilirubin_total,", "lab,total bilirubin,bilirubin_direct,", "truth"),
    (CSV.format("units"), "creatinine,mg/dL,umol/l,0.0113", "creatinine,mg/dL,umol/l,0.113", "dictionary"),
    (CSV.format("units"), "crp,mg/L,mg/dl,10,", "crp,mg/L,mg/dl,100,", "dictionary"),
    (CSV.format("concepts"), 'creatinine,mg/dL,"[0.1,28.28]"', 'creatinine,mg/dL,"[0.1,2.8]"', "dictionary"),
    (CSV.format("concepts"), 'mean_bp,mmHg,"(0,300)"', 'mean_bp,mmHg,"[0,300)"', "dictionary"),
    (CSV.format("eicu_breathing"), "O2 Device,high flow nasal cannula,1", "O2 Device,high flow nasal cannula,0", "eicu"),
    ("hospitals/eicu/infusions.py", '"dopamine": 1600', '"dopamine": 160', "dictionary"),
    (MIMICIV, "LOOKBACK = 24 * 60", "LOOKBACK = 12 * 60", "mimiciv"),
    ("hospitals/mimiciv/sofa.py", "CREATININE_MAX = 150", "CREATININE_MAX = 4", "sofa"),
    # what was known when
    ("derive/sepsis.py", 'pl.col("known_minute") < before', 'pl.col("known_minute") < before * 10', "future"),
    ("derive/sepsis.py", 'known=pl.max_horizontal("known", "second")', 'known="known"', "future"),
    ("derive/sepsis.py", 'known=pl.max_horizontal("known", until)', 'known="known"', "future"),
    ("views.py", "store.known[row] < minute[owner]", "store.known[row] <= minute[owner]", "module"),
    ("views.py", "axis=0) + opening", "axis=0) + 0 * opening", "module"),
    ("views.py", "CARRY = 24", "CARRY = 23", "module"),
    ("build.py", "np.maximum(minute, known), minute)", "minute, minute)", "store"),
    ("hospitals/eicu/flowsheet.py", 'known_minute=pl.max_horizontal("minute", pl.col(entry).cast(pl.Int32))',
     'known_minute=pl.col("minute")', "eicu future"),
    (EICU, 'how="diagonal").with_columns(minute="revised")', 'how="diagonal")', "eicu future"),
    (EICU, 'written = care.select("stay_id", "minute", level=level)',
     'written = care.select("stay_id", minute=pl.col("ventstartoffset").cast(pl.Int32), level=level)', "eicu future"),
    ("hospitals/eicu/infection.py", "GROWTH_KNOWN = pl.duration(hours=48)", "GROWTH_KNOWN = pl.duration(hours=0)", "sepsis"),
    ("hospitals/eicu/infusions.py", "HOLDS = 300", "HOLDS = 60", "eicu"),
    ("derive/treatment.py", "SILENCE = 360", "SILENCE = 480", "treatment eicu"),
    ("tasks.py", "(_MINUTE < _ONSET).fill_null(True)", "(_MINUTE <= _ONSET).fill_null(True)", "cohort"),
    # right values
    ("build.py", "clip = (state == OUTSIDE) & rate & fresh", "clip = (state == OUTSIDE) & rate & ~fresh", "store mimiciv"),
    ("hospitals/mimiciv/records.py", 'WITHDRAWN = "Rewritten"', 'WITHDRAWN = "Removed"', "mimiciv"),
    ("hospitals/mimiciv/records.py", "repeated = ~pl.struct(row).is_first_distinct()",
     "repeated = pl.lit(False)", "mimiciv"),
    ("hospitals/mimiciv/records.py", 'then(-pl.col("value").abs())', 'then(-pl.col("value"))', "mimiciv"),
    (MIMICIV, "(leave.is_null() | (draw <= leave))", "(draw <= leave)", "mimiciv"),
    (EICU, "pl.when(inches).then(height * 2.54)", "pl.when(inches).then(height)", "eicu"),
    (EICU, "pl.when(in_unit.fill_null(False)).then(pl.lit(True)).otherwise(in_hospital)",
     "pl.coalesce(in_hospital, in_unit)", "eicu"),
    ("hospitals/eicu/infection.py", '"antibacterials|antibiotics", "prophylactic"', '"antibacterials|antibiotics", "nothing"',
     "sepsis"),
    # splits and caches
    ("hospitals/physionet2012.py", 'chosen |= {"b", "c"}', "pass", "physionet"),
    ("cohort.py", 'if hospital.split_by == "hospital":\n            first', 'if False:\n            first', "cohort"),
    ("build.py", "return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns", "return facts.st_size, 0, 0", "store"),
    ("build.py", '(*SOURCES, "dictionary/*.csv")', "SOURCES", "store"),
]  # fmt: skip


def main() -> int:
    """Try every mutant, or those whose file holds one of the words given on the command line."""
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(word in m[0] for word in sys.argv[1:])]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".git", ".venv*", ".cache", "runs", "data", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        if (ROOT.parent / "shared").is_dir():
            (copy.parent / "shared").symlink_to(ROOT.parent / "shared")
        for name, line, wrong, tests in chosen:
            path = copy / "datamodules" / name
            text = path.read_text()
            if text.count(line) != 1:
                verdict = f"DOES NOT APPLY ({text.count(line)} places)"
            else:
                path.write_text(text.replace(line, wrong))
                files = [f"tests/datamodules/test_{test}.py" for test in tests.split()]
                verdict = "caught" if noticed(copy, files) else "SURVIVED"
                path.write_text(text)
            failures += verdict != "caught"
            print(f"{verdict:10} {name}: {wrong.strip() or '(line left out)'}", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} caught")
    return int(failures > 0)


def noticed(copy: Path, files: list[str]) -> bool:
    """Whether any of the test files fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(copy), "POLARS_MAX_THREADS": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False).returncode != 0


if __name__ == "__main__":
    raise SystemExit(main())
