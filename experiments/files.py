"""Files that are whole or not there, and the console that every verb prints to."""

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console


class _Console(Console):
    """A console that can write what it prints to a file as well."""

    log_path: Path | None = None

    @contextmanager
    def logging_to(self, path: Path) -> Iterator[None]:
        """Append every line that is printed meanwhile to ``path``, without colour; a quiet console writes nothing.

        A line that cannot be written, as on a full disk, is missing there: no training ends for its log.
        """
        self.log_path = path
        try:
            yield
        finally:
            self.log_path = None

    def print(self, *objects: Any, **how: Any) -> None:
        """Print as ``rich`` does."""
        super().print(*objects, **how)
        if self.log_path is None or self.quiet:
            return
        plain = Console(file=io.StringIO(), width=self.width, force_terminal=False, color_system=None)
        plain.print(*objects, **how)
        lines = plain.file.getvalue()  # type: ignore[attr-defined]
        with (
            suppress(OSError),
            self.log_path.open("a", encoding="utf-8") as file,
        ):  # anew each time: a run may last for days
            file.write(lines)


UNLIMITED = 10_000  # characters: in a pipe or a file nothing is wrapped
console = _Console(width=None if sys.stdout.isatty() else UNLIMITED)


def write(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the new one, also when the run is killed or the disk is full.

    A process that is to be quiet writes nothing either: the first of those that train together does.
    """
    if console.quiet:
        return
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_bytes(content)
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
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
