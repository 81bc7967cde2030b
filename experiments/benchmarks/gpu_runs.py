"""Commands as `make gpu-check` tries them: repeated, killed and resumed, by other strategies, short of memory, from end to end."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ehrmodels.checkpoint import read
from experiments.benchmarks.gpu_measure import Deadline, Row, attempt, measured

LIMIT, LONG = 150, 300  # seconds that a command may take; one on PhysioNet 2012
AT_ONCE = 4  # commands whose time is not measured
SMALL = "--trainer.max_epochs 2 --data.batch_size 64 --model.width 32"
MODELS = {
    "Fusion": f"--model Fusion {SMALL}",
    "HyMaTE variable": f"--model HyMaTE --model.attention variable --model.layers 2 {SMALL}",
}
# As `ehr`, with a share of the GPU's memory.
SHORT = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]))
from experiments.cli import main
main(sys.argv[2:])
"""
PART = 0.5  # of the memory that batches of 1,024 take
ALIKE = 0.02  # AUROC of another strategy
WEIGHTS = "largest difference of weights"
SECONDS = {"fusion_physionet2012": 20, "hymate_physionet2012": 60}


class Finished(NamedTuple):
    """A command that has ended."""

    status: int
    said: str
    seconds: float


Runner = Callable[..., Finished]


def run(arguments: list[str], until: Callable[[], bool] | None = None, limit: float = LIMIT) -> Finished:
    """Run Python with ``arguments`` in a process group of its own, which is killed as soon as ``until`` is true.

    Raises:
        RuntimeError: it had not ended after ``limit`` seconds.
    """
    here = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    begun, late = time.monotonic(), False
    with tempfile.TemporaryFile("w+") as out:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None and not late and not (until is not None and until()):
                time.sleep(0.005 if until else 0.05)
                late = time.monotonic() - begun > limit
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has left behind
            process.wait()
        out.seek(0)
        said = out.read()
    if late:
        raise RuntimeError(f"it had not ended after {limit} s: {_last(said)}")
    return Finished(process.returncode, said, time.monotonic() - begun)


class Commands:
    """Trainings on simulated stays, each in a run directory of its own.

    Args:
        data: folder with the files of the stays.
        cache: of extracted data.
        folder: of the run directories, which must be new.
        deadline: when to begin nothing more.
        column: of the rows that tell of one way to scan: the one that commands take by themselves.
        runner: runs a command, as ``run``.
    """

    def __init__(self, data: Path, cache: Path, folder: Path, deadline: Deadline, column: str, runner: Runner = run):
        self.cache = f"--data.cache {shlex.quote(str(cache))}"
        self.data = f"--data SyntheticMIMICIV --data.root {shlex.quote(str(data))} {self.cache}"
        self.folder, self.deadline, self.column, self.runner = folder, deadline, column, runner

    def rows(self) -> Iterator[list[Row]]:
        """All that is tried on simulated stays, ``AT_ONCE`` at a time."""
        tries: list[Callable[[], list[Row]]] = [
            *(partial(self.repeated, model, True) for model in MODELS),
            self.strategies,
            self.short_of_memory,
            *(partial(self.repeated, model, False) for model in MODELS),
        ]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in as_completed([pool.submit(call) for call in tries]):
                yield done.result()

    def train(
        self, name: str, options: str, *, before: tuple[str, ...] = ("-m", "experiments.cli"), **how: object
    ) -> Path:
        """The run directory of a training that has ended well, or was killed by ``until``."""
        run = self.folder / name
        arguments = [*before, "train", *shlex.split(options), "--runs", str(self.folder), "--name", name]
        finished = self.runner(arguments, **how)
        if finished.status and not ("until" in how and finished.status == -signal.SIGKILL):
            raise RuntimeError(f"{name}: exit status {finished.status}: {_last(finished.said)}")
        return run

    def repeated(self, model: str, deterministic: bool) -> list[Row]:
        """A training twice with one seed, and if it is to be deterministic killed and resumed; the weights beside each other."""
        what = f"{model}, {'deterministic' if deterministic else 'as it is'}"
        name = what.replace(",", "").replace(" ", "-").lower()
        options = f"{MODELS[model]} {self.data} --trainer.deterministic {str(deterministic).lower()}"
        runs: list[Path] = []

        def once() -> list[Row]:
            runs.append(self.train(f"{name}-1", options))
            return []

        def twice() -> list[Row]:
            found = {"between": apart(runs[0], self.train(f"{name}-2", options))}
            return [measured(f"{what}: twice with one seed", WEIGHTS, found, 0.0 if deterministic else None)]

        def killed() -> list[Row]:
            each = f"{options} --checkpoint_minutes 0"
            last = self.folder / f"{name}-killed" / "last.ckpt"
            self.train(f"{name}-killed", each, until=lambda: within_second_epoch(last))
            if not within_second_epoch(last):
                raise RuntimeError("it had ended before it could be killed in its second epoch")
            found = {"between": apart(runs[0], self.train(f"{name}-killed", f"{each} --resume"))}
            return [measured(f"{what}: killed and resumed", WEIGHTS, found, 0.0)]

        rows = attempt(what, once, self.deadline)
        if runs:
            rows += attempt(f"{what}: twice with one seed", twice, self.deadline)
        if runs and deterministic:
            rows += attempt(f"{what}: killed and resumed", killed, self.deadline)
        return rows

    def strategies(self) -> list[Row]:
        """The AUROC of trainings by DDP and FSDP on one device, less that of a plain one."""
        options, plain = f"{MODELS['Fusion']} {self.data}", list[float]()

        def by(strategy: str) -> list[Row]:
            flags = f" --trainer.strategy {strategy} --trainer.devices 1"
            reached = auroc(self.train(strategy, options + flags))
            found = {"between": abs(reached - plain[0])}
            return [
                measured(f"Fusion, --trainer.strategy {strategy}", "difference of AUROC to a plain run", found, ALIKE)
            ]

        def first() -> list[Row]:
            plain.append(auroc(self.train("plain", options)))
            return []

        rows = attempt("Fusion, plain", first, self.deadline)
        for strategy in ("ddp", "fsdp") if plain else ():
            rows += attempt(f"Fusion, --trainer.strategy {strategy}", partial(by, strategy), self.deadline)
        return rows

    def short_of_memory(self) -> list[Row]:
        """A training whose batches do not fit into the memory that it may take, but parts of them do."""
        what = "HyMaTE variable, out of memory"
        options = f"{MODELS['HyMaTE variable']} --data.batch_size 1024 {self.data}"

        def calls() -> list[Row]:
            took = re.search(r"at most ([\d,]+) of ([\d,]+) MiB of the GPU", log(self.train("whole", options)))
            if took is None:
                raise RuntimeError("run.log does not say how much memory of the GPU a plain run took")
            most, there = (int(number.replace(",", "")) for number in took.groups())
            run = self.train("parts", options, before=("-c", SHORT, str(PART * most / there)))
            goes_on = "out of memory: training goes on" in log(run)
            outcome = "ok" if goes_on else "FAILS: run.log does not say that it was computed in parts"
            return [Row(what, f"goes on in parts with {PART * most:,.0f} MiB instead of {most:,}", outcome=outcome)]

        return attempt(what, calls, self.deadline)

    def end_to_end(self, root: Path) -> Iterator[list[Row]]:
        """Seconds of the commands that train on PhysioNet 2012, one after another, once its files have been extracted."""

        data = f"--data.root {shlex.quote(str(root))} {self.cache}"

        def prepared() -> list[Row]:
            arguments = ["-m", "experiments.cli", "prepare", "--data", "PhysioNet2012", *shlex.split(data)]
            finished = self.runner([*arguments, "--out", str(self.folder / "tables")], limit=LONG)
            if finished.status:
                raise RuntimeError(_last(finished.said))
            return [Row("ehr prepare, PhysioNet 2012", "seconds", between=finished.seconds)]

        def trained(config: str) -> list[Row]:
            begun = time.monotonic()
            run = self.train(config, f"-c {config} {data}", limit=LONG)
            whole, target = time.monotonic() - begun, f"at most {SECONDS[config]}"
            # environment.txt is the first that a run writes, report.html the last
            own = (run / "report.html").stat().st_mtime - (run / "environment.txt").stat().st_mtime
            what = f"ehr train -c {config}"
            return [
                measured(what, "seconds", {self.column: whole}, target=target),
                measured(what, "seconds after start-up", {self.column: own}),
            ]

        yield attempt("ehr prepare, PhysioNet 2012", prepared, self.deadline)
        for config in SECONDS:
            yield attempt(f"ehr train -c {config}", partial(trained, config), self.deadline)


def apart(one: Path, other: Path) -> float:
    """The largest difference between the weights of two runs' best checkpoints; 0 only where they are equal bit by bit."""
    mine, yours = (read(run / "best.ckpt")["state_dict"] for run in (one, other))
    if mine.keys() != yours.keys():
        raise RuntimeError(f"{one.name} and {other.name} have other layers")
    return max(float((mine[name].double() - yours[name].double()).abs().max()) for name in mine)


def within_second_epoch(last: Path) -> bool:
    """Whether a checkpoint was written between two batches of the second epoch."""
    if not last.exists():
        return False
    checkpoint = read(last)
    return checkpoint["epoch"] == 1 and checkpoint["callbacks"]["_Epochs"]["within"] is not None


def auroc(run: Path) -> float:
    """Of the test split."""
    return json.loads((run / "metrics.json").read_text())["test"]["auroc"]["value"]


def log(run: Path) -> str:
    return (run / "run.log").read_text()


def _last(said: str) -> str:
    return " ".join(said.split())[-250:]
