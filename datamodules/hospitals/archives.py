"""The challenges of PhysioNet as they are published: an archive or a folder of one small file a stay."""

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path


def letters(chosen: str | None, offered: str, option: str) -> list[str] | None:
    """The letters of "b,c", sorted; None where nothing is chosen.

    Raises:
        ValueError: a letter is not offered; names the option.
    """
    if chosen is None:
        return None
    parts = sorted({c.strip() for c in chosen.split(",") if c.strip()})
    wrong = [c for c in parts if c not in offered]
    if wrong or not parts:
        raise ValueError(
            f"--data.{option} {chosen}: expected letters among {','.join(offered)}, such as {offered[0]},{offered[1]}"
        )
    return parts


def first_of(root: Path, names: tuple[str, ...], letter: str) -> Path | None:
    """The first of some names (with ``{}`` for the letter) that is below ``root``."""
    return next((p for name in names if (p := root / name.format(letter)).exists()), None)


def no_data(root: Path, letter: str, names: tuple[str, ...]) -> FileNotFoundError:
    """The error for a set that is not there."""
    expected = " or ".join(name.format(letter) for name in names[:2])
    return FileNotFoundError(
        f"no data of {letter} in {root}: expected {expected}; set --data.root to the folder that holds it"
    )


def members(source: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Name without suffix and content of each file of an archive or folder, by name."""
    count = 0
    try:
        if source.is_dir():
            for path in sorted(source.rglob(f"*{suffix}")):
                count += 1
                yield path.stem, path.read_bytes()
        elif source.suffix == ".zip":
            with zipfile.ZipFile(source) as archive:
                for name in sorted(n for n in archive.namelist() if n.endswith(suffix)):
                    count += 1
                    yield Path(name).stem, archive.read(name)
        else:
            with tarfile.open(source) as archive:
                for member in archive:  # in the archive's order: a gzip stream cannot be read backwards
                    if member.isfile() and member.name.endswith(suffix):
                        count += 1
                        yield Path(member.name).stem, archive.extractfile(member).read()  # type: ignore[union-attr]
    except (EOFError, gzip.BadGzipFile, tarfile.ReadError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{source}: the archive is cut off or damaged ({error}); download it again") from error
    if not count:
        raise ValueError(f"{source}: no *{suffix} file found inside; expected one a stay")


def files_of(source: Path, suffix: str) -> list[Path]:
    """An archive, or the files of a folder: what a store's key is made of."""
    return [source] if source.is_file() else sorted(source.rglob(f"*{suffix}"))
