"""An Optuna study that many processes share: which trial is whose, and what became of it.

A trial belongs to a process for as long as that process holds the trial's lock: a file lock beside the journal, or an advisory
lock of the PostgreSQL server. The kernel, or the server, takes the lock back when the process ends, however it ends. So there
are no heartbeats, clocks or periods of grace: a running trial whose lock is free has lost its process, and whoever finds it
goes on with it, under its number and in its run directory. Trials are drawn under one lock of the study, each from a seed of
its own. Where few configurations are possible, one may be drawn again: such a trial ends at once and is not trained.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import numpy as np
import optuna
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments import settings
from experiments.sweep.locks import STUDY, connect
from experiments.sweep.space import distributions
from experiments.train import train

ATTEMPTS = 5  # times that a trial may lose its process without one more epoch
FIRST_FAILURES = 5  # trials after which a study is given up when all failed

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """The study ``name`` in ``storage``, made if it is not there.

    Args:
        name: of the study.
        storage: path of a journal file, for the processes of one machine; or postgresql://user@host/database, for those of
            several.
        terms: what must be the same for all processes: ``space`` (see ``distributions``), ``config`` (what every trial
            starts from, as YAML), ``direction`` ("max" or "min"), ``sampler_seed``, ``warmup`` (epochs before pruning) and
            whatever else.

    Raises:
        ValueError: the storage cannot be reached, or the study there has other terms.
    """

    def __init__(self, name: str, storage: str, terms: dict[str, Any]):
        self.space = distributions(terms["space"])
        self._begun = set[int]()  # numbers of the trials that this process has begun and not ended
        self.seed, self.maximised = terms["sampler_seed"], terms["direction"] == "max"
        self._locks, open_storage = connect(storage, name)
        with ExitStack() as opened:
            opened.callback(self._locks.close)
            with self.locked():
                store = open_storage()
                opened.callback(store.remove_session)
                if isinstance(store, optuna.storages.RDBStorage):
                    opened.callback(store.engine.dispose)
                self._study = optuna.create_study(
                    study_name=name,
                    storage=store,
                    direction="maximize" if self.maximised else "minimize",
                    pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=terms["warmup"]),
                    load_if_exists=True,
                )
                self._agree(terms)
            self._opened = opened.pop_all()

    def _agree(self, terms: dict[str, Any]) -> None:
        agreed = self._study.user_attrs
        for key, value in terms.items():
            if key not in agreed:
                self._study.set_user_attr(key, value)
                continue
            if key == "config":
                unlike = self._unlike(*(yaml.safe_load(text) for text in (agreed[key], value)))
            else:
                unlike = f"  {agreed[key]} there, {value} here" if agreed[key] != value else ""
            if unlike:
                raise ValueError(
                    f"study {self._study.study_name} was begun with another {key}:\n{unlike}\n"
                    "give the command that it was begun with, or choose another --name"
                )

    def _unlike(self, stored: dict[str, Any], new: dict[str, Any]) -> str:
        """In what two configurations differ, a line each; not where they divide the same batches among other numbers of devices."""
        different = settings.differences(stored, new, train)
        told, devices = settings.as_flags(different), different.get("trainer.devices")
        if devices is None:
            return told
        if any(name.replace("-", "_").endswith(".batch_size") for name in self.space):
            return f"{told}\n  (the batches that --space names are those of one device)"
        sizes = different.get("data.init_args.batch_size", (1, 1))
        if len(different) == 2 and int(devices[0]) * sizes[0] == int(devices[1]) * sizes[1]:
            return ""
        return (
            f"{told}\n  (other devices are the same study where --data.batch_size times --trainer.devices is the same)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of all locks and connections."""
        self._opened.close()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Meanwhile no other process draws or ends a trial, nor writes the files of the study."""
        self._locks.acquire(STUDY, wait=True)
        try:
            yield
        finally:
            self._locks.release(STUDY)

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self._study.get_trials(deepcopy=False)

    def finished(self, total: int) -> bool:
        """Whether ``total`` trials were begun and none is left to do."""
        trials = self.trials()
        return len(trials) >= total and all(t.state.is_finished() for t in trials)

    def best(self, trials: list[FrozenTrial]) -> FrozenTrial | None:
        """The complete trial of the best value among ``trials``, if there is one; infinity is no value."""
        complete = [t for t in trials if t.state == TrialState.COMPLETE and math.isfinite(value(t))]
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
        with self.locked():
            while True:
                trials = self.trials()
                self._give_up_where_all_failed(trials)
                trial = self._orphan(trials)
                if trial is None:
                    if len(trials) >= total and not any(t.state == TrialState.WAITING for t in trials):
                        return None
                    trial = self._sampled(len(trials), self._study.ask)
                    self._locks.acquire(trial.number)
                    self._begun.add(trial.number)
                if not self._ended_as_repeat(trial, trials):
                    return trial

    def _give_up_where_all_failed(self, trials: list[FrozenTrial]) -> None:
        trained = [t for t in trials if "repeats" not in t.user_attrs]
        failed = [t for t in trained if t.state == TrialState.FAIL]
        if len(failed) >= FIRST_FAILURES and not any(
            t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trained
        ):
            raise ValueError(
                f"the first {len(failed)} trials all failed, the last because: {failed[-1].user_attrs.get('reason')}; "
                "mend that and choose another --name"
            )

    def _orphan(self, trials: list[FrozenTrial]) -> Trial | None:
        """A running trial that has lost its process, and is this one's now."""
        for frozen in trials:
            if frozen.state != TrialState.RUNNING or frozen.number in self._begun:
                continue
            if not self._locks.acquire(frozen.number):
                continue
            self._begun.add(frozen.number)
            trial = self._sampled(frozen.number, partial(Trial, self._study, frozen._trial_id))
            epochs, (lost_after, losses) = len(frozen.intermediate_values), frozen.user_attrs.get("lost", [0, 0])
            losses = losses + 1 if lost_after == epochs else 1
            if losses < ATTEMPTS:
                trial.set_user_attr("lost", [epochs, losses])
                return trial
            reason = f"its process was killed {ATTEMPTS} times in the same epoch: did the machine run out of memory?"
            self._end(trial, TrialState.FAIL, reason=reason)
        return None

    def _ended_as_repeat(self, trial: Trial, trials: list[FrozenTrial]) -> bool:
        """Whether ``trial`` has the configuration of an earlier one; it then has ended, with the same value if there is one."""
        original = next((t for t in trials if t.number < trial.number and t.params == trial.params), None)
        if original is None:
            return False
        if original.state == TrialState.COMPLETE:
            facts = {key: fact for key, fact in original.user_attrs.items() if key in ("config", "run", "seed")}
            self._end(trial, TrialState.COMPLETE, original.value, repeats=original.number, **facts)
        else:
            reason = f"same configuration as trial {original.number}"
            self._end(trial, TrialState.PRUNED, repeats=original.number, reason=reason)
        return True

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

        What is no finite number is not reported, but a sign that the process still has its trial.

        Raises:
            optuna.TrialPruned: the trial is not worth going on.
        """
        self._locks.check()
        if not math.isfinite(value):
            return
        if epoch not in self.trials()[trial.number].intermediate_values:
            trial.report(value, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned(f"pruned after epoch {epoch}")

    def release_without_penalty(self, trial: Trial) -> None:
        """This process leaves the trial to another by intention, which must not count as an attempt that was lost."""
        trial.set_user_attr("lost", [0, 0])

    def leave(self, trial: Trial) -> None:
        """Let any process, this one too, go on with the trial as with one that has lost its process."""
        self._locks.release(trial.number)
        self._begun.remove(trial.number)

    def end(self, trial: Trial, state: TrialState, value: float | None = None, **facts: Any) -> None:
        """Finish a trial of this process; ``facts`` are kept with it."""
        with self.locked():  # also fails where the connection that holds the trial's lock is gone
            self._end(trial, state, value, **facts)

    def _end(self, trial: Trial, state: TrialState, value: float | None = None, **facts: Any) -> None:
        for key, fact in facts.items():
            trial.set_user_attr(key, fact)
        self._study.tell(trial, value, state)
        self.leave(trial)


def value(trial: FrozenTrial) -> float:
    """The value of a complete trial."""
    assert trial.value is not None
    return trial.value
