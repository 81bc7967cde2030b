"""Simulated MIMIC-IV and eICU: raw files of any size, for demos, tests and benchmarks, never for medicine."""

from datamodules.simulate.truth import truth
from datamodules.simulate.write import RECORD, simulate, write

__all__ = ["RECORD", "simulate", "truth", "write"]
