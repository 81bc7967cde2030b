"""The hospital systems by the names that ``--data`` takes: one import each; ``docs/extending.md`` shows how to add
one."""

from datamodules.hospitals import base
from datamodules.hospitals.eicu import EICU  # noqa: F401
from datamodules.hospitals.meds import MEDS  # noqa: F401
from datamodules.hospitals.mimiciv import MIMICIV  # noqa: F401
from datamodules.hospitals.physionet2012 import PhysioNet2012  # noqa: F401
from datamodules.hospitals.physionet2019 import PhysioNet2019  # noqa: F401
from datamodules.hospitals.simulated import SyntheticEICU, SyntheticMIMICIV  # noqa: F401
from datamodules.hospitals.tables import Tables  # noqa: F401

__all__ = [name for name, kind in list(globals().items()) if isinstance(kind, type) and issubclass(kind, base.Hospital)]
