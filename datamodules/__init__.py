"""ICU records of a hospital system as a LightningDataModule: ``from datamodules import MIMICIV, EICU``.

Importing this package imports neither torch nor lightning; the data modules do, when they are asked for.
"""  # part of ehr: start.py looks for these words

from typing import Any


def __getattr__(name: str) -> Any:
    if not name[0].isupper():  # a module of this package, which Python looks for next
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from datamodules import module

    return getattr(module, name)
