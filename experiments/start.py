"""Starts ``ehr``. Installed as the module ``ehr_command``, a name that no other project has.

``datamodules`` and ``experiments`` are names that another installed project, or a folder on PYTHONPATH, may have too; pip then
overwrites one with the other without a word. So the command first looks whether the packages are this project's.
"""

import importlib.util
import sys
from pathlib import Path

MARK = "# part of ehr"  # in files of ours that another project would overwrite
OURS = {"datamodules": ("__init__.py",), "ehrmodels": ("__init__.py",), "experiments": ("__init__.py", "cli.py")}


def main() -> None:
    """Run ``ehr``, or say which package is not this project's and end with status 2."""
    for package, files in OURS.items():
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or []) if spec is not None else []
        if not folders:
            _stop(f"its package {package!r} is not installed: pip install --force-reinstall ehr")
        for name in files:
            path = Path(folders[0]) / name
            if not path.is_file():
                _stop(
                    f"{path} is gone, which happens when another project with a package {package!r} was uninstalled: "
                    "pip install --force-reinstall ehr"
                )
            if MARK not in path.read_text(encoding="utf-8", errors="replace"):
                _stop(
                    f"{path} is not this project's: another project, installed or on PYTHONPATH, has a package {package!r}, too; "
                    "install ehr in a virtual environment of its own"
                )
    from experiments.cli import main as command

    command()


def _stop(message: str) -> None:
    print(f"ehr: {message}", file=sys.stderr)
    raise SystemExit(2)
