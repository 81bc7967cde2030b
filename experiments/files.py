"""Files that are whole or not there, and the console that every verb prints to."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

console = Console(width=None if sys.stdout.isatty() else 160)


def write(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the new one, also when the run is killed or the disk is full.

    A process that is to be quiet writes nothing either: the first of those that train together does.
    """
    if console.quiet:
        return
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write(path, text.encode())


def write_json(content: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_parquet(table: pl.DataFrame, path: Path) -> None:
    content = io.BytesIO()
    table.write_parquet(content)
    write(path, content.getvalue())


def save(checkpoint: dict[str, Any], path: Path) -> None:
    import torch

    content = io.BytesIO()  # on a full disk torch.save itself raises a RuntimeError without the reason
    torch.save(checkpoint, content)
    write(path, content.getvalue())
