"""The hospital systems by the names that ``--data`` takes; ``docs/extending.md`` shows how to add one."""

from datamodules.hospitals.eicu import EICU
from datamodules.hospitals.mimiciv import MIMICIV
from datamodules.hospitals.physionet2012 import PhysioNet2012
from datamodules.hospitals.physionet2019 import PhysioNet2019
from datamodules.hospitals.simulated import SyntheticEICU, SyntheticMIMICIV
from datamodules.hospitals.tables import Tables

__all__ = ["EICU", "MIMICIV", "PhysioNet2012", "PhysioNet2019", "SyntheticEICU", "SyntheticMIMICIV", "Tables"]
