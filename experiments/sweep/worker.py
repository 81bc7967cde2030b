"""``python -m experiments.imports experiments.sweep.worker``: one of the processes of a sweep."""

import json
import math
import os
import platform
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import optuna
import polars as pl
import yaml
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments import cli, fit, tracking, train
from experiments.processes import RENEW, Standing, why_failed
from experiments.run_directory import code, configuration, empty
from experiments.sweep import ranks
from experiments.sweep.locks import server_lost
from experiments.sweep.space import flag
from experiments.sweep.study import Study

NOT_OPTIONS = (
    "model",
    "data",
    "trainer",
    "finetune",
    "resume",
    "trial",
)  # arguments of ``train`` that are described apart


def standing(study: Study, order: dict[str, Any]) -> Standing:
    """How far a study is."""
    trials, monitor = study.trials(), order["terms"]["monitor"]
    ended = {t.number: outcome(t, monitor) for t in trials if t.state.is_finished()}
    best, shown = study.best(trials), str(order["name"])
    if best is not None:
        shown += f", best {best.value:.4f} (trial {best.number})"
    return Standing(ended, shown, len(ended) + sum(len(t.intermediate_values) for t in trials))


def outcome(trial: FrozenTrial, monitor: str) -> str:
    """What became of a trial, in one line."""
    parameters = "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    if trial.state == TrialState.COMPLETE:
        text = f"{monitor} {trial.value:.4f}"
    elif trial.state == TrialState.PRUNED:
        text = f"pruned after epoch {max(trial.intermediate_values, default=0)}"
    else:
        text = f"failed: {trial.user_attrs.get('reason', 'no reason was recorded')}"
    if "repeats" in trial.user_attrs:
        text = f"repeats trial {trial.user_attrs['repeats']}, not trained again"
    return f"trial {trial.number:3d}  {text}  [dim]{parameters}[/]"


def work(order: dict[str, Any]) -> None:
    """Run trials of a study until none is left, or until the process that started this one is gone."""
    with Study(order["name"], order["storage"], order["terms"]) as study:
        while os.getppid() == order["parent"]:
            trial = study.claim(order["trials"])
            if trial is not None:
                attempt(study, trial, order)
            elif study.finished(order["trials"]):
                return
            else:
                time.sleep(1)  # another process may die, and its trial is then ours


def attempt(study: Study, trial: Trial, order: dict[str, Any]) -> None:
    """Train one trial and say in the study what became of it; goes on where a process before this one left it.

    A trial on several devices is trained by processes of its own; one that was begun on another number of them begins anew.
    """
    folder, run_name = Path(order["folder"]), f"trial-{trial.number:04d}"
    monitor = order["terms"]["monitor"]
    # not as the file has them: it may be that of another command of the study, with other devices
    arguments = [f"--trainer.devices={order['devices']}", f"--data.batch_size={order['batch_size']}"]
    arguments += ["-c", str(folder / "train.yaml"), *(flag(k, v) for k, v in trial.params.items())]
    arguments += [f"--runs={folder}", f"--name={run_name}", "--data.split=val"]

    def report(epoch: int, row: dict[str, float]) -> None:
        if (epoch + 1) % every == 0:  # else the row may repeat what an earlier epoch was measured at
            study.report(trial, epoch, row.get(monitor, math.nan))
        if os.getppid() != order["parent"]:
            raise KeyboardInterrupt

    try:
        values = cli.configured("train", arguments)
        every = values["trainer"].get("check_val_every_n_epoch") or 1
        others = {name: value for name, value in values.items() if name not in NOT_OPTIONS}
        config = configuration(values["model"], {"data": values["data"]}, values["trainer"], **others)
        facts = {
            "config": yaml.safe_dump(config),
            "seed": values["seed"],
            "run": str(folder / run_name),
            "code": code(),
        }
        for key, fact in (facts | {"host": platform.node()}).items():
            trial.set_user_attr(key, fact)
        begun = folder / run_name / "config.yaml"
        if begun.exists() and str(yaml.safe_load(begun.read_text())["trainer"]["devices"]) != str(order["devices"]):
            empty(begun.parent)
        told = fit.Trial(order["name"], trial.number, trial.params, report)
        if order["devices"] > 1:
            ranks.train_on(order["devices"], arguments, told)
        else:
            train.train(**{**values, "resume": True}, trial=told)
        best = _best_epoch(folder / run_name / "metrics.csv", monitor)
        study.end(trial, TrialState.COMPLETE, best[monitor], metrics=best)
    except optuna.TrialPruned:
        study.end(trial, TrialState.PRUNED)
        tracking.end({"state": "pruned"})
    except KeyboardInterrupt:
        study.release_without_penalty(trial)
        raise
    except OSError:
        raise  # the disk: no fault of the trial
    except ranks.RankLostError as error:
        print(f"{run_name}: {error}", flush=True)
        study.leave(trial)
    except SystemExit:
        study.end(trial, TrialState.FAIL, reason="its command line was refused: see the worker's log")
    except ValueError as error:
        print(f"{run_name}: {error}", flush=True)
        study.end(trial, TrialState.FAIL, reason=str(error))
        tracking.end({"state": "failed"}, failed=True)
    except Exception as error:
        if server_lost(error):
            raise
        traceback.print_exc()
        study.end(trial, TrialState.FAIL, reason=why_failed(error))
        tracking.end({"state": "failed"}, failed=True)
        raise SystemExit(RENEW) from error


def _best_epoch(path: Path, monitor: str) -> dict[str, float]:
    """The row of metrics.csv with the best value of ``monitor``, among the epochs that were validated.

    Raises:
        ValueError: there is none.
    """
    epochs = pl.read_csv(path)
    if monitor in epochs.columns:
        epochs = epochs.filter(pl.col(monitor).cast(pl.Float64, strict=False).is_finite())
    if monitor not in epochs.columns or epochs.is_empty():
        raise ValueError(f"no epoch has a value of {monitor}: is --trainer.check_val_every_n_epoch above max_epochs?")
    descending = fit.MONITORS[monitor] == "max"
    return epochs.sort(monitor, descending=descending, maintain_order=True).row(0, named=True)


def main() -> None:
    """Do what the order on standard input says."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background with it ignored
    cli.guarded(lambda: work(json.load(sys.stdin)), "ehr sweep --help")
