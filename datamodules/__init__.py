"""ICU records of a hospital system as a LightningDataModule: ``from datamodules import MIMICIV, EICU``.

Importing this package imports neither torch nor lightning; the data modules do, when they are asked for.
"""

from typing import Any

DATA_MODULES = (
    "EICU",
    "MIMICIV",
    "PhysioNet2012",
    "PhysioNet2019",
    "SyntheticEICU",
    "SyntheticMIMICIV",
    "Tables",
    "ICUDataModule",
)


def __getattr__(name: str) -> Any:
    if name not in DATA_MODULES:
        raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
    from datamodules import module

    return getattr(module, name)
