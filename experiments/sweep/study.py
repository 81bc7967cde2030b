"""An Optuna study that many processes share: which trial is whose, and what became of it.

A trial belongs to a process for as long as that process holds the trial's lock: a file lock beside the journal, or an advisory lock of
the PostgreSQL server. The kernel, or the server, takes the lock back when the process ends, however it ends. So there are no heartbeats,
clocks or periods of grace: a running trial whose lock is free has lost its process, and whoever finds it goes on with it, under its number
and in its run directory. Trials are drawn under one lock of the study, each from a seed of its own, so that no two processes draw the same.
"""

import difflib
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import optuna
import yaml
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

STUDY = -1  # the number of the study's own lock, beside those of trials
ATTEMPTS = 5  # times that a trial may lose its process without one more epoch
FIRST_FAILURES = 5  # trials after which a study is given up when all failed

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """The study ``name`` in ``storage``, made if it is not there.

    Args:
        name: of the study.
        storage: path of a journal file, for the processes of one machine; or postgresql://user@host/database, for those of several.
        settings: what must be the same for all processes: ``space`` (see ``distributions``), ``direction`` ("max" or "min"),
            ``sampler_seed``, ``warmup`` (epochs before pruning) and whatever else.

    Raises:
        ValueError: the storage cannot be reached, or the study there has other settings.
    """

    def __init__(self, name: str, storage: str, settings: dict[str, Any]):
        self.space = distributions(settings["space"])
        self._mine = set[int]()  # trials that this process has begun
        self.seed, self.maximised = settings["sampler_seed"], settings["direction"] == "max"
        make: Callable[[], optuna.storages.BaseStorage]
        self._locks: _FileLocks | _ServerLocks
        self._locks, make = _server(storage, name) if "://" in storage else _journal(storage)
        with ExitStack() as opened:
            opened.callback(self._locks.close)
            with self._locked():
                kept_in = make()
                opened.callback(kept_in.remove_session)
                if isinstance(kept_in, optuna.storages.RDBStorage):
                    opened.callback(kept_in.engine.dispose)
                self._study = optuna.create_study(
                    study_name=name,
                    storage=kept_in,
                    direction="maximize" if self.maximised else "minimize",
                    pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=settings["warmup"]),
                    load_if_exists=True,
                )
                self._agree(settings)
            self._opened = opened.pop_all()

    def _agree(self, settings: dict[str, Any]) -> None:
        known = self._study.user_attrs
        for key, value in settings.items():
            if key not in known:
                self._study.set_user_attr(key, value)
            elif known[key] != value:
                raise ValueError(
                    f"study {self._study.study_name} was begun with another {key}:\n{_differences(known[key], value)}\n"
                    "give the command that it was begun with, or choose another --name"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of all locks and connections."""
        self._opened.close()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._locks.take(STUDY, wait=True)
        try:
            yield
        finally:
            self._locks.leave(STUDY)

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self._study.get_trials(deepcopy=False)

    def finished(self, total: int) -> bool:
        """Whether ``total`` trials were begun and none is left to do."""
        trials = self.trials()
        return len(trials) >= total and all(t.state.is_finished() for t in trials)

    def best(self, trials: list[FrozenTrial]) -> FrozenTrial | None:
        """The complete trial of the best value among ``trials``, if there is one."""
        complete = [t for t in trials if t.state == TrialState.COMPLETE]
        return (max if self.maximised else min)(complete, key=value, default=None)

    def importance(self) -> dict[str, float]:
        """Share of each parameter in what sets good trials apart (PED-ANOVA, Watanabe et al. 2023); empty for fewer than ten trials."""
        complete = [t for t in self.trials() if t.state == TrialState.COMPLETE]
        if len(complete) < 10 or len({t.value for t in complete}) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.importance.get_param_importances(self._study)

    def claim(self, total: int) -> Trial | None:
        """A trial for this process: one that lost its process, else a new one while there are fewer than ``total``.

        Raises:
            ValueError: the first trials all failed.
        """
        with self._locked():
            trials = self.trials()
            failed = [t for t in trials if t.state == TrialState.FAIL]
            if len(failed) >= FIRST_FAILURES and not any(
                t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials
            ):
                raise ValueError(
                    f"the first {len(failed)} trials all failed, the last because: {failed[-1].user_attrs.get('reason')}; "
                    "mend that and choose another --name"
                )
            for frozen in trials:
                if (
                    frozen.state != TrialState.RUNNING
                    or frozen.number in self._mine
                    or not self._locks.take(frozen.number)
                ):
                    continue
                self._mine.add(frozen.number)
                trial = self._sampled(frozen.number, partial(Trial, self._study, frozen._trial_id))
                epochs, lost = len(frozen.intermediate_values), frozen.user_attrs.get("lost", [0, 0])
                lost = [epochs, lost[1] + 1 if lost[0] == epochs else 1]
                if lost[1] < ATTEMPTS:
                    trial.set_user_attr("lost", lost)
                    return trial
                reason = (
                    f"its process was killed {ATTEMPTS} times in the same epoch: did the machine run out of memory?"
                )
                self._end(trial, TrialState.FAIL, reason=reason)
            if len(trials) >= total and not any(t.state == TrialState.WAITING for t in trials):
                return None
            trial = self._sampled(len(trials), self._study.ask)
            self._locks.take(trial.number)
            self._mine.add(trial.number)
            return trial

    def _sampled(self, number: int, make: Callable[[], Trial]) -> Trial:
        """A trial with all its parameters; those that it has already stay as they are."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
            trial = make()
            for name, d in self.space.items():
                if isinstance(d, CategoricalDistribution):
                    trial.suggest_categorical(name, d.choices)
                elif isinstance(d, IntDistribution):
                    trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
                elif isinstance(d, FloatDistribution):
                    trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)
        return trial

    def report(self, trial: Trial, epoch: int, value: float) -> None:
        """Tell the pruner of an epoch; one that was reported before the trial lost its process is not reported twice.

        Raises:
            optuna.TrialPruned: the trial is not worth going on.
        """
        self._locks.check()
        if epoch not in self.trials()[trial.number].intermediate_values:
            trial.report(value, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned(f"pruned after epoch {epoch}")

    def spare(self, trial: Trial) -> None:
        """This process leaves the trial to another by intention, which must not count as an attempt that was lost."""
        trial.set_user_attr("lost", [0, 0])

    def end(self, trial: Trial, state: TrialState, value: float | None = None, **facts: Any) -> None:
        """Finish a trial of this process; ``facts`` are kept with it."""
        with self._locked():  # also fails where the connection that holds the trial's lock is gone
            self._end(trial, state, value, **facts)

    def _end(self, trial: Trial, state: TrialState, value: float | None = None, **facts: Any) -> None:
        for key, fact in facts.items():
            trial.set_user_attr(key, fact)
        self._study.tell(trial, value, state)
        self._locks.leave(trial.number)
        self._mine.remove(trial.number)


def server_lost(error: BaseException) -> bool:
    """Whether an error says that the storage's server cannot be reached any more."""
    return isinstance(error, optuna.exceptions.StorageInternalError) or type(error).__module__.startswith(
        ("sqlalchemy", "psycopg")
    )


def value(trial: FrozenTrial) -> float:
    """The value of a complete trial."""
    assert trial.value is not None
    return trial.value


# ---- search space ----------------------------------------------------------------------------------------------------------


def distributions(space: dict[str, Any]) -> dict[str, BaseDistribution]:
    """Optuna's distributions of a search space as it is written.

    Args:
        space: flag of ``ehr train`` without dashes -> a list of choices, or ``{low, high}`` with ``log: true`` or ``step`` if wanted;
            whole numbers where both bounds are whole.

    Raises:
        ValueError: an entry is neither.
    """
    if not space:
        raise ValueError(
            "--space is empty: expected flags of ehr train, such as {model.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}}"
        )
    found: dict[str, BaseDistribution] = {}
    for name, entry in space.items():
        try:
            if isinstance(entry, list):
                if not entry or not all(c is None or isinstance(c, bool | int | float | str) for c in entry):
                    raise ValueError("choices must be numbers, words, true, false or null")
                found[name] = CategoricalDistribution(entry)
            elif isinstance(entry, dict) and {"low", "high"} <= set(entry) <= {"low", "high", "log", "step"}:
                bounds = [entry["low"], entry["high"]]
                if not all(isinstance(b, int | float) and not isinstance(b, bool) for b in bounds):
                    raise ValueError("low and high must be numbers")
                low, high, log = entry["low"], entry["high"], bool(entry.get("log", False))
                if all(isinstance(b, int) for b in bounds):
                    found[name] = IntDistribution(low, high, log=log, step=int(entry.get("step", 1)))
                else:
                    found[name] = FloatDistribution(low, high, log=log, step=entry.get("step"))
            else:
                raise ValueError("expected a list of choices, or low and high, with log or step")
        except (ValueError, TypeError) as error:
            raise ValueError(f"--space {name}: {str(error).rstrip('.')}, found {entry}") from error
    return found


def _differences(known: Any, found: Any) -> str:
    """Lines that are only there (-) or only here (+)."""
    texts = [value if isinstance(value, str) else yaml.safe_dump(value) for value in (known, found)]
    lines = difflib.unified_diff(texts[0].splitlines(), texts[1].splitlines(), lineterm="", n=0)
    return "\n".join(f"  {line}" for line in lines if not line.startswith(("---", "+++", "@@")))


# ---- journal: the processes of one machine -----------------------------------------------------------------------------------


class _FileLocks:
    """Locks of one folder's files. The kernel frees those of a process that died."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._held = folder, dict[int, FileLock]()

    def take(self, number: int, wait: bool = False) -> bool:
        lock = self._held.setdefault(number, FileLock(self._folder / f"{'study' if number == STUDY else number}.lock"))
        try:
            lock.acquire(timeout=-1 if wait else 0, poll_interval=0.01)
        except Timeout:
            return False
        return True

    def leave(self, number: int) -> None:
        self._held[number].release()

    def check(self) -> None:
        """Nothing takes these locks away."""

    def close(self) -> None:
        for lock in self._held.values():
            lock.release(force=True)


class _Journal(JournalFileBackend):
    """Optuna's journal, made to outlive what happens to its writers.

    Its own lock is a file that a killed process leaves behind, over which the others wait for half a minute. And it appends to the half
    line that a killed process or a full disk leaves, after which the journal cannot be read any more.
    """

    def __init__(self, path: Path):
        self._free = FileLock(f"{path}.lock", poll_interval=0.005)
        self._path = path
        super().__init__(str(path), self._free)  # type: ignore[arg-type]  # acquire() and release() are all it needs

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._free, self._path.open("rb+") as journal:
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

    def take(self, number: int, wait: bool = False) -> bool:
        if wait:
            self._connection.execute(
                self._text("SELECT pg_advisory_lock(:study, :number)"), {"study": self._study, "number": number}
            )
            return True
        asked = self._text("SELECT pg_try_advisory_lock(:study, :number)")
        return bool(self._connection.execute(asked, {"study": self._study, "number": number}).scalar())

    def leave(self, number: int) -> None:
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
        said = " ".join(str(error.orig).split())
        raise ValueError(
            f"--storage {shown} cannot be reached ({said}): is the server up, and are user, password and database right?"
        ) from error
    text = url.render_as_string(hide_password=False)
    return locks, lambda: optuna.storages.RDBStorage(text, engine_kwargs={"pool_pre_ping": True, "pool_size": 2})
