"""``python -m experiments.benchmarks.check_sweep``: sweeps whose processes are killed at random, on both storages, with one device and
with two a trial; whether both find the same; and how fast sweeps are.

Needs the programs of PostgreSQL (initdb, postgres) for that half; says so where they are not installed.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import polars as pl
import yaml
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from experiments import cli, fit, train
from experiments.files import console, write_text
from experiments.sweep.study import Study

RESULTS = Path(__file__).parents[1] / "results"
CONFIG = """\
name: check
trials: 40
space:
  model.learning_rate: {low: 1.0e-3, high: 1.0e-1, log: true}
  model.width: [8, 16]
  model.dropout: {low: 0.0, high: 0.5}
data:
  class_path: SyntheticMIMICIV
model:
  class_path: Fusion
trainer: {max_epochs: 8}
"""
KILLS = {1: 60, 2: 24}  # by devices a trial, at most, so that a slow machine also comes to an end


def configuration(home: Path, stays: int) -> str:
    """``CONFIG`` over simulated files below ``home``."""
    whole = yaml.safe_load(CONFIG)
    whole["data"]["init_args"] = {"root": str(home / f"data-{stays}"), "stays": stays}
    return yaml.safe_dump(whole)


def programs() -> Path | None:
    """The folder of PostgreSQL's programs, where they are installed."""
    found = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    return next((Path(p).resolve().parent for p in found if p), None)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """A PostgreSQL server of its own in ``folder``; gives its URL."""
    binaries = programs()
    assert binaries is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        user = {"user": "nobody"}
        folder.mkdir(parents=True)
        shutil.chown(folder, "nobody")
    place = folder / "postgresql"
    common: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/", **user}
    subprocess.run([binaries / "initdb", "-D", place, "-U", "ehr", "--auth=trust", "--no-sync"], check=True, **common)
    arguments = [
        "-p",
        str(port),
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        f"unix_socket_directories={place}",
        "-c",
        "fsync=off",
    ]
    process = subprocess.Popen([binaries / "postgres", "-D", place, *arguments], **common)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"postgresql://ehr@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def workers(command: int) -> list[int]:
    """Process ids of the workers that the process ``command`` has started."""
    return _children(command)


def ranks(worker: int) -> list[int]:
    """Process ids of those that train a trial for a worker, the first of them first."""
    return sorted(rank for server in _children(worker) if _forks(server) for rank in _children(server))


def _forks(process: int) -> bool:
    """Whether a process is what starts ranks, or one of them."""
    with contextlib.suppress(OSError):
        return b"multiprocessing.forkserver" in Path(f"/proc/{process}/cmdline").read_bytes()
    return False


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def killed(folder: Path, storage: str | None, rng: random.Random, devices: int) -> dict[str, Any]:
    """Run a sweep of 4 processes that train; every few seconds kill -9 one of its processes, and now and then the command itself,
    which is then given again."""
    study_folder = folder / f"check-{devices}"
    line = [sys.executable, "-m", "experiments.cli", "sweep", "-c", str(folder / "check.yaml"), f"--runs={folder}"]
    line += [
        f"--name={study_folder.name}",
        f"--workers={4 // devices}",
        f"--trainer.devices={devices}",
        f"--data.batch_size={64 // devices}",
    ]
    line += ["--storage", storage] if storage else []
    kills, seen = {"worker": 0, "rank": 0, "command": 0}, set[int]()
    start, trained = time.monotonic(), dict[int, int]()
    with (folder / "output").open("ab") as output:
        process = subprocess.Popen(line, stdout=output, stderr=output)
        while process.poll() is None:
            time.sleep(rng.uniform(1, 3))
            if devices > 1:  # ranks start after their worker: on a slow machine a trial would be killed again and again
                now = progress(study_folder, storage)
                if not now or any(done <= trained.get(number, 0) for number, done in now.items()):
                    continue
                trained = now
            running = workers(process.pid)
            training = [rank for worker in running for rank in ranks(worker)]
            seen |= set(training)
            if not running or sum(kills.values()) >= KILLS[devices]:
                continue
            if rng.random() < 0.15:
                process.kill()
                process.wait()
                kills["command"] += 1
                process = subprocess.Popen(line, stdout=output, stderr=output)
            else:
                victim = rng.choice([*running, *training])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                kills["rank" if victim in training else "worker"] += 1
    if process.returncode:
        output_tail = (folder / "output").read_text()[-2000:]
        raise RuntimeError(f"the sweep ended with {process.returncode}: {output_tail}")
    if left := [rank for rank in seen if _forks(rank)]:
        raise RuntimeError(f"ranks outlived their sweep: {left}")
    study = opened(study_folder, storage)
    trials = study.trials()
    best = study.best(trials)
    assert best is not None
    numbers = sorted(t.number for t in trials)
    again = [sys.executable, "-m", "experiments.cli", "train", "-c", str(study_folder / "best.yaml")]
    subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
    curves = [
        pl.read_csv(run / "metrics.csv")["val_auroc_auprc"]
        for run in (folder / f"{study_folder.name}-best", study_folder / f"trial-{best.number:04d}")
    ]
    return {
        "storage": "PostgreSQL" if storage else "journal file",
        "devices a trial": devices,
        "trials": len(trials),
        "finished": sum(t.state.name in ("COMPLETE", "PRUNED") for t in trials),
        "failed": sum(t.state.name == "FAIL" for t in trials),
        "missing numbers": len(set(range(40)) - set(numbers)),
        "repeated configurations": len(trials) - len({tuple(sorted(t.params.items())) for t in trials}),
        "workers killed": kills["worker"],
        "ranks killed": kills["rank"],
        "commands killed": kills["command"],
        "trials that lost a process": sum("lost" in t.user_attrs for t in trials),
        "best": f"{best.value:.6f}",
        "best, by ehr train": f"{max(curves[0].to_list()):.6f}",
        "minutes": f"{(time.monotonic() - start) / 60:.1f}",
    }


def progress(folder: Path, storage: str | None) -> dict[int, int]:
    """Trial that is not over -> how many epochs it has; nothing where none was begun."""
    if not any(folder.glob("trial-*")):
        return {}
    with opened(folder, storage) as study:
        return {t.number: len(t.intermediate_values) for t in study.trials() if not t.state.is_finished()}


def opened(folder: Path, storage: str | None) -> Study:
    """The study of a sweep whose folder is ``folder``."""
    where: Any = storage and storage.replace("postgresql:", "postgresql+psycopg:")
    journal = str(folder / "study.journal")
    known = optuna.load_study(
        study_name=folder.name, storage=where or optuna.storages.JournalStorage(JournalFileBackend(journal))
    )
    return Study(folder.name, storage or journal, known.user_attrs)


def plain(folder: Path, trials: int) -> None:
    """Optuna's own loop over the same objective, in this process."""
    study = optuna.create_study(
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=2),
        sampler=optuna.samplers.TPESampler(seed=0),
    )

    def objective(trial: optuna.Trial) -> float:
        flags = [
            f"--model.learning_rate={trial.suggest_float('rate', 1e-3, 1e-1, log=True)}",
            f"--model.width={trial.suggest_categorical('width', [8, 16])}",
            f"--model.dropout={trial.suggest_float('dropout', 0, 0.5)}",
        ]

        def report(epoch: int, row: dict[str, float]) -> None:
            trial.report(row["val_auroc_auprc"], epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        place = [f"--runs={folder}", f"--name=plain-{trial.number}", "--data.split=val"]
        values = cli.configured("train", ["-c", str(folder / "train.yaml"), *flags, *place])
        train.train(**values, trial=fit.Trial("plain", trial.number, trial.params, report))
        return max(pl.read_csv(folder / f"plain-{trial.number}" / "metrics.csv")["val_auroc_auprc"].to_list())

    study.optimize(objective, n_trials=trials)


def check_kills(home: Path, storages: list[str | None]) -> None:
    rng, rows = random.Random(0), []
    for devices in (1, 2):
        for storage in storages:
            folder = home / f"{'server' if storage else 'journal'}-{devices}"
            folder.mkdir()
            write_text(folder / "check.yaml", configuration(home, 800))
            rows.append(killed(folder, storage, rng, devices))
            console.print(rows[-1])
    pl.DataFrame(rows).write_csv(RESULTS / "sweep_killed.csv")


def check_ranks(home: Path, trials: int = 14) -> None:
    """One sweep of trials on one device and one of trials on two, with the same batches and nothing random in training.

    Their learning rates are low: high ones make differences of a last bit large within epochs, and whatever is drawn next differs.
    """
    whole = yaml.safe_load(configuration(home, 800))
    whole["space"] = {"model.learning_rate": {"low": 1e-4, "high": 3e-3, "log": True}, "model.width": [8, 16]}
    whole["model"]["init_args"] = {"dropout": 0.0}
    write_text(home / "ranks.yaml", yaml.safe_dump(whole))
    found: dict[int, list[FrozenTrial]] = {}
    rows: list[dict[str, Any]] = []
    for devices in (1, 2):
        line = ["sweep", "-c", str(home / "ranks.yaml"), f"--name=ranks-{devices}", f"--runs={home}", "--workers=1"]
        line += [f"--trials={trials}", f"--trainer.devices={devices}", f"--data.batch_size={64 // devices}"]
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "experiments.cli", *line], check=True, stdout=subprocess.DEVNULL)
        minutes = (time.monotonic() - start) / 60
        with opened(home / f"ranks-{devices}", None) as study:
            found[devices], best = study.trials(), study.best(study.trials())
        assert best is not None
        pairs = [(a, b) for a, b in zip(found[1], found[devices], strict=True) if a.params == b.params]
        values = [abs(a.value - b.value) for a, b in pairs if a.value is not None and b.value is not None]
        same = sum(a.state == b.state for a, b in pairs)
        row: dict[str, Any] = {"devices a trial": devices, "--data.batch_size": 64 // devices, "trials": trials}
        row |= {"pruned": sum(t.state.name == "PRUNED" for t in found[devices])}
        row |= {"as with one device": same, "largest difference of values": f"{max(values):.1e}"}
        row |= {"best trial": best.number, "best": f"{best.value:.6f}", "minutes": f"{minutes:.1f}"}
        rows.append(row)
        console.print(row)
    pl.DataFrame(rows).write_csv(RESULTS / "sweep_ranks.csv")


def check_speed(home: Path, trials: int = 40) -> None:
    """Whole commands, with all that they import; the raw files and the store are there already."""
    whole = yaml.safe_load(configuration(home, 4000))
    write_text(home / "check.yaml", yaml.safe_dump(whole))
    write_text(home / "train.yaml", yaml.safe_dump({k: whole[k] for k in ("data", "model", "trainer")}))

    def loop(count: int) -> list[str]:
        return [
            "-c",
            f"from pathlib import Path; from experiments.benchmarks.check_sweep import plain; plain(Path({str(home)!r}), {count})",
        ]

    commands = {"Optuna's own loop, one process": loop(trials)}
    for count in (1, 2, 4):
        line = [
            "sweep",
            "-c",
            str(home / "check.yaml"),
            f"--name=speed-{count}",
            f"--workers={count}",
            f"--runs={home}",
            f"--trials={trials}",
        ]
        commands[f"ehr sweep --workers {count}"] = ["-m", "experiments.cli", *line]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *loop(1)], check=True, env=environment, stdout=subprocess.DEVNULL)
    shutil.rmtree(home / "plain-0")
    rows: list[dict[str, Any]] = []
    for what, arguments in commands.items():
        start = time.monotonic()
        subprocess.run([sys.executable, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
        rows.append({"what": what, "trials": trials, "trials a minute": 60 * trials / (time.monotonic() - start)})
        console.print(rows[-1])
    table = pl.DataFrame(rows).with_columns(ratio=(pl.col("trials a minute") / rows[0]["trials a minute"]).round(2))
    table.with_columns(pl.col("trials a minute").round(1)).write_csv(RESULTS / "sweep_speed.csv")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        home = Path(name)
        home.chmod(0o755)  # for the user as whom the server runs
        storages: list[str | None] = [None]
        if programs() is None:
            console.print("PostgreSQL is not installed (initdb is not found): only the journal file is tried")
        else:
            storages.insert(0, stack.enter_context(server(home / "postgresql")))
        check_kills(home, storages)
        check_ranks(home)
        check_speed(home)


if __name__ == "__main__":
    main()
