"""Locks that end with their process, and storages that outlive theirs: a journal file on one machine, PostgreSQL for several."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import optuna
from filelock import FileLock, Timeout
from optuna.storages.journal import JournalFileBackend

STUDY = -1  # the number of the study's own lock, beside those of trials


class Locks(Protocol):
    """Locks of a study, by the number of a trial; no other process can acquire one that this process holds."""

    def acquire(self, number: int, wait: bool = False) -> bool:
        """Whether the lock is this process's now."""

    def release(self, number: int) -> None:
        """Let others have the lock."""

    def check(self) -> None:
        """Raise an error where the locks were lost meanwhile."""

    def close(self) -> None:
        """Release all of them."""


def connect(storage: str, name: str) -> tuple[Locks, Callable[[], optuna.storages.BaseStorage]]:
    """The locks of the study ``name``, and what opens its storage once the study's own lock is held.

    Raises:
        ValueError: the storage cannot be reached, or is of another kind.
    """
    return _server(storage, name) if "://" in storage else _journal(storage)


def server_lost(error: BaseException) -> bool:
    """Whether an error says that the storage's server cannot be reached any more."""
    return isinstance(error, optuna.exceptions.StorageInternalError) or type(error).__module__.startswith(
        ("sqlalchemy", "psycopg")
    )


# ---- journal: the processes of one machine -----------------------------------------------------------------------------------


class _FileLocks:
    """Locks of one folder's files. The kernel frees those of a process that died."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._held = folder, dict[int, FileLock]()

    def acquire(self, number: int, wait: bool = False) -> bool:
        lock = self._held.setdefault(number, FileLock(self._folder / f"{'study' if number == STUDY else number}.lock"))
        try:
            lock.acquire(timeout=-1 if wait else 0, poll_interval=0.01)
        except Timeout:
            return False
        return True

    def release(self, number: int) -> None:
        self._held[number].release()

    def check(self) -> None:
        """Nothing takes these locks away."""

    def close(self) -> None:
        for lock in self._held.values():
            lock.release(force=True)


class _Journal(JournalFileBackend):
    """Optuna's journal, made to outlive what happens to its writers.

    Its own lock is a file that a killed process leaves behind, over which the others wait for half a minute. And it appends
    to the half line that a killed process or a full disk leaves, after which the journal cannot be read any more.
    """

    def __init__(self, path: Path):
        self._lock_file = FileLock(f"{path}.lock", poll_interval=0.005)
        self._path = path
        super().__init__(str(path), self._lock_file)  # type: ignore[arg-type]  # acquire() and release() are all it needs

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._lock_file, self._path.open("rb+") as journal:
            end = size = journal.seek(0, 2)
            while end:
                start = max(end - 4096, 0)
                journal.seek(start)
                newline = journal.read(end - start).rfind(b"\n")
                end = start + newline + 1
                if newline >= 0:
                    break
            if end < size:
                journal.truncate(end)
            super().append_logs(logs)


def _journal(storage: str) -> tuple[_FileLocks, Callable[[], optuna.storages.BaseStorage]]:
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _FileLocks(path.with_name(f"{path.name}.locks")), lambda: optuna.storages.JournalStorage(_Journal(path))


# ---- PostgreSQL: the processes of many machines ------------------------------------------------------------------------------


class _ServerLocks:
    """Advisory locks on one connection. The server frees those of a connection that is gone."""

    def __init__(self, url: Any, study: str):
        import sqlalchemy

        self._text = sqlalchemy.text
        self._study = int.from_bytes(hashlib.blake2b(study.encode(), digest_size=4).digest(), "big", signed=True)
        alive = {
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
        }  # a machine without power is noticed in a minute
        engine = sqlalchemy.create_engine(
            url,
            poolclass=sqlalchemy.pool.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"connect_timeout": 10, **alive},
        )
        self._connection = engine.connect()
        for name, value in alive.items():
            self._connection.execute(self._text(f"SET tcp_{name} = {value}"))

    def acquire(self, number: int, wait: bool = False) -> bool:
        if wait:
            self._connection.execute(
                self._text("SELECT pg_advisory_lock(:study, :number)"), {"study": self._study, "number": number}
            )
            return True
        query = self._text("SELECT pg_try_advisory_lock(:study, :number)")
        return bool(self._connection.execute(query, {"study": self._study, "number": number}).scalar())

    def release(self, number: int) -> None:
        self._connection.execute(
            self._text("SELECT pg_advisory_unlock(:study, :number)"), {"study": self._study, "number": number}
        )

    def check(self) -> None:
        """Raise the driver's error where the connection, and with it the locks, are gone: another process may have the trial."""
        self._connection.execute(self._text("SELECT 1"))

    def close(self) -> None:
        self._connection.close()


def _server(storage: str, name: str) -> tuple[_ServerLocks, Callable[[], optuna.storages.BaseStorage]]:
    import sqlalchemy

    try:
        url = sqlalchemy.make_url(storage)
    except sqlalchemy.exc.ArgumentError as error:
        raise ValueError(f"--storage {storage.partition('://')[0]}://...: {error}") from error
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() != "postgresql":
        raise ValueError(f"--storage {shown}: expected a journal file, or postgresql://user@host/database")
    url = url.set(drivername="postgresql+psycopg")
    try:
        locks = _ServerLocks(url, name)
    except ImportError as error:
        raise ValueError(
            "--storage postgresql://... needs the package psycopg: install it with pip install 'ehr[postgresql]'"
        ) from error
    except sqlalchemy.exc.OperationalError as error:
        reason = " ".join(str(error.orig).split())
        raise ValueError(
            f"--storage {shown} cannot be reached ({reason}): is the server up, and are user, password and database right?"
        ) from error
    text = url.render_as_string(hide_password=False)
    return locks, lambda: optuna.storages.RDBStorage(text, engine_kwargs={"pool_pre_ping": True, "pool_size": 2})
