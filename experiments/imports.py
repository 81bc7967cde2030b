"""Imports what takes long: ``python -m experiments.imports MODULE`` does so and calls its ``main``."""

import gc
import importlib
import sys
from types import ModuleType


def imported(name: str) -> ModuleType:
    """Import a module without looking for garbage meanwhile, nor ever in what is there then.

    What is imported stays. To look through it again and again, and once more at the end, is a third of the time of a command that
    does little else.
    """
    if name in sys.modules:
        return sys.modules[name]
    looked = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if looked:
            gc.enable()


if __name__ == "__main__":
    imported(sys.argv[1]).main()
