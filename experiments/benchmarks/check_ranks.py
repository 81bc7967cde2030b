"""`make check-ranks`: several processes beside one, and training that is killed beside training that is not.

On simulated stays, without a GPU: two processes of gloo, started by Lightning and by torchrun, must give the losses and scores of one
process with the same batches; a checkpoint must score alike under 1, 2 and 3 processes; kill -9 at random moments must change
nothing. Results go to ``ranks.csv``, ``kills.csv`` and ``recompute.csv`` in ``experiments/results``, each row with its command.
"""

import argparse
import json
import os
import random
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import torch

from datamodules import simulate
from datamodules.contract import Spec, Triplets
from datamodules.module import SyntheticMIMICIV
from ehrmodels import load
from ehrmodels.checkpoint import read
from ehrmodels.hymate import HyMaTE
from experiments import files
from experiments.evaluate import predict_split
from experiments.files import console
from experiments.metrics import score

HERE = Path(__file__).parents[1] / "results"
STAYS, KILLED_STAYS = 3000, 600
# Without anything random in training, so that one process and two differ by rounding alone.
FUSION = "--model Fusion --model.width 32 --model.dropout 0"
HYMATE = "--model HyMaTE --model.width 16 --model.layers 1 --model.state 4 --model.attention variable --model.dropout 0"
# With all that is random in training, and gradients of two batches added up.
KILLED = {
    "Fusion": "--model Fusion --model.width 32 --trainer.accumulate_grad_batches 2 --trainer.max_epochs 6 --data.batch_size 4",
    "HyMaTE": "--model HyMaTE --model.width 16 --model.layers 1 --model.state 4 --data.thinning 0.3 --trainer.max_epochs 3 --data.batch_size 8",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.check_ranks", description="several processes beside one; kill -9"
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=20,
        help="how often training is killed, over both models and both numbers of processes",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the throughput is the median")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--score", nargs=3, metavar=("CKPT", "ROOT", "OUT"), help="what torchrun runs: score a checkpoint and stop"
    )
    parser.add_argument(
        "--step", nargs=3, metavar=("STAYS", "LENGTH", "RECOMPUTE"), help="measure one training step of HyMaTE and stop"
    )
    chosen = parser.parse_args()
    if chosen.step:
        _step(*map(int, chosen.step))
        return
    if chosen.score:
        _score(*chosen.score)
        return
    _record("recompute", recompute())
    with tempfile.TemporaryDirectory(prefix="check-ranks-") as folder:
        os.environ |= {"OMP_NUM_THREADS": "1", "EHR_CACHE": f"{folder}/cache"}
        data = Path(folder) / "data"
        simulate.write("MIMICIV", data, STAYS, seed=1)
        here = Path(folder)
        _record("ranks", [*agreement(here), *scoring(here), *throughput(here, chosen.repeats)])
        simulate.write("MIMICIV", here / "few", KILLED_STAYS, seed=1)
        _record("kills", kills(here, chosen.kills, chosen.seed))


def _record(name: str, rows: Iterable[dict[str, Any]]) -> None:
    content = pl.DataFrame(list(rows), infer_schema_length=None)
    content.write_csv(HERE / f"{name}.csv")
    console.print(content.drop("command").write_csv(), highlight=False, soft_wrap=True)


# ---- commands ---------------------------------------------------------------------------------------------------------------


def _line(model: str, name: str, **options: object) -> str:
    said = " ".join(f"--{key} {value}" for key, value in options.items())
    return f"train {model} --data SyntheticMIMICIV --data.root data --name {name} {said}".strip()


def _start(folder: Path, line: str, by_torchrun: int = 0, threads: int = 1) -> subprocess.Popen:
    """Run ``ehr`` in a folder, in a session of its own so that all its processes can be killed together."""
    command = [*TORCHRUN, str(by_torchrun)] if by_torchrun else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [*command, "-m", "experiments.cli", *shlex.split(line)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _run(folder: Path, line: str, by_torchrun: int = 0, threads: int = 1) -> str:
    """The command as it is typed; raises where it fails."""
    with console.status(line):
        _finish(_start(folder, line, by_torchrun, threads), line)
    return _typed(line, by_torchrun)


def _finish(process: subprocess.Popen, line: str) -> str:
    """What a command prints; raises where it fails."""
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"ehr {line}: exit status {process.returncode}\n{out}{err}")
    return out


def _typed(line: str, by_torchrun: int = 0) -> str:
    return f"`{f'torchrun --nproc-per-node {by_torchrun} -m experiments.cli' if by_torchrun else 'ehr'} {line}`"


# ---- several processes beside one ------------------------------------------------------------------------------------------


def agreement(folder: Path) -> Iterator[dict[str, Any]]:
    """Losses and scores of two processes less those of one with the same batches."""
    for kind, model in (("Fusion", FUSION), ("HyMaTE", HYMATE)):
        epochs: dict[str, object] = {"trainer.max_epochs": 3}
        name = kind.lower()
        command = _run(folder, _line(model, f"{name}-1", **epochs, **{"data.batch_size": 64}))
        one = folder / "runs" / f"{name}-1"
        yield {
            "what": "training, batches of 64",
            "model": kind,
            "processes": "1",
            "stays scored": _scored(one),
            "result": "",
            "command": command,
        }
        for how, count in (("Lightning", 0), ("torchrun", 2)):
            other = one.with_name(f"{name}-{how.lower()}")
            command = _run(
                folder, _line(model, other.name, **epochs, **{"data.batch_size": 32, "trainer.devices": 2}), count
            )
            differences = {
                column: _largest(pl.read_csv(one / "metrics.csv")[column] - pl.read_csv(other / "metrics.csv")[column])
                for column in ("train_loss", "val_loss", "val_auroc", "val_auprc")
            }
            mine, yours = (read(r / "last.ckpt")["state_dict"] for r in (one, other))
            differences["weights"] = max(float((mine[k] - yours[k]).abs().max()) for k in mine)
            differences |= {f"test {m}": abs(_test(one, m) - _test(other, m)) for m in ("auroc", "auprc")}
            yield {
                "what": "the same training, difference to one process",
                "model": kind,
                "processes": f"2 ({how})",
                "stays scored": _scored(other),
                "result": ", ".join(f"{m} {d:.1e}" for m, d in differences.items()),
                "command": command,
            }


def _largest(difference: pl.Series) -> float:
    return float(difference.abs().max())  # type: ignore[arg-type]


def _test(run: Path, metric: str) -> float:
    return json.loads((run / "metrics.json").read_text())["test"][metric]["value"]


def _scored(run: Path) -> str:
    """How many test stays were scored; raises unless each was scored once."""
    table = pl.read_parquet(run / "predictions.parquet").filter(split="test")
    if table["stay_id"].n_unique() != len(table):
        raise RuntimeError(f"{run}: a stay was scored twice")
    return str(len(table))


def scoring(folder: Path) -> Iterator[dict[str, Any]]:
    """Probabilities and scores of one checkpoint under 1, 2 and 3 processes."""
    for kind in ("Fusion", "HyMaTE"):
        checkpoint, tables = f"runs/{kind.lower()}-1/best.ckpt", {}
        for count in (1, 2, 3):
            out = folder / f"{kind}-{count}.parquet"
            command = ["-m", "experiments.benchmarks.check_ranks", "--score", checkpoint, "data", str(out.name)]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
            subprocess.run(
                [*TORCHRUN, str(count), *command], cwd=folder, check=True, env=environment, stderr=subprocess.DEVNULL
            )
            tables[count] = pl.read_parquet(out)
            row = {"what": "scoring every stay with one checkpoint", "model": kind, "processes": str(count)}
            row |= {
                "stays scored": str(len(tables[count])),
                "result": "",
                "command": f"`torchrun --nproc-per-node {count} {' '.join(command)}`",
            }
            if count > 1:
                if not tables[1].drop("probability").equals(tables[count].drop("probability")):
                    raise RuntimeError(f"{count} processes scored other samples than one")
                mine, yours = (score(tables[n], 0.1) for n in (1, count))
                apart = max(abs(mine[m]["value"] - yours[m]["value"]) for m in ("auroc", "auprc", "brier"))
                largest = _largest(tables[1]["probability"] - tables[count]["probability"])
                row["result"] = f"difference to one process: probabilities {largest:.1e}, metrics {apart:.1e}"
            yield row


def _score(checkpoint: str, root: str, out: str) -> None:
    torch.distributed.init_process_group("gloo")
    files.console.quiet = torch.distributed.get_rank() > 0
    model, data = load(checkpoint), SyntheticMIMICIV(root)
    data.adopt(model.spec)
    files.write_parquet(predict_split(model, data, "all"), Path(out))
    torch.distributed.destroy_process_group()


def throughput(folder: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """Training stays a second, validation and checkpoints included, the ways in turns; with a small and with a large batch."""
    ways = {"1, one thread": (1, 1), "1, two threads": (1, 2), "2, one thread each": (2, 1)}
    model = FUSION.replace("--model.width 32", "--model.width 64")
    for batch in (64, 512):
        found: dict[str, list[float]] = {way: [] for way in ways}
        commands: dict[str, str] = {}
        for repeat in range(repeats):
            for way, (processes, threads) in ways.items():
                name = f"speed-{batch}-{processes}-{threads}-{repeat}"
                line = _line(
                    model,
                    name,
                    **{"trainer.max_epochs": 5, "trainer.devices": processes, "data.batch_size": batch // processes},
                )
                commands[way] = f"`OMP_NUM_THREADS={threads} ehr {line}`"
                found[way].append(_speed(folder, line, folder / "runs" / name, threads))
        for way, values in found.items():
            ratio = statistics.median(values) / statistics.median(found["1, one thread"])
            shown = f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f}), {ratio:.2f} of one process with one thread"
            yield {
                "what": f"training stays a second, batches of {batch} in all, median of {repeats}, {os.cpu_count()} cores",
                "model": "Fusion",
                "processes": way,
                "stays scored": "",
                "result": shown,
                "command": commands[way],
            }


def _speed(folder: Path, line: str, run: Path, threads: int) -> float:
    """Training stays a second between the ends of the first and of the last epoch."""
    process = _start(folder, line, threads=threads)
    ends: dict[int, float] = {}
    while process.poll() is None:
        ends.setdefault(_rows(run / "metrics.csv"), time.monotonic())
        time.sleep(0.002)
    training = int(_finish(process, line).split(" training samples")[0].rsplit(" ", 1)[-1].replace(",", ""))
    return training * (max(ends) - 1) / (ends[max(ends)] - ends[1])


def _rows(table: Path) -> int:
    return len(table.read_text().splitlines()) - 1 if table.exists() else 0


# ---- killed beside unbroken -------------------------------------------------------------------------------------------------


def kills(folder: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Each training is killed again and again, resumed each time, and compared bit by bit with the one that was not."""
    kinds = [(kind, processes) for kind in KILLED for processes in (1, 2)]
    with ThreadPoolExecutor(2) as pool, console.status("killing"):
        yield from pool.map(
            lambda number: _killed(folder, *kinds[number], count // len(kinds), random.Random(seed + number)),
            range(len(kinds)),
        )


def _killed(folder: Path, kind: str, processes: int, count: int, chance: random.Random) -> dict[str, str]:
    options = {"trainer.devices": processes, "checkpoint_minutes": 0.001}
    line = _line(KILLED[kind], kind.lower(), **options)
    homes = [folder / f"{kind}-{processes}-{what}" for what in ("unbroken", "killed")]
    for home in homes:
        home.mkdir()
        (home / "data").symlink_to(folder / "few")
    begun = time.monotonic()
    _finish(_start(homes[0], line), line)
    took, places, victims = time.monotonic() - begun, [], []
    for number in range(count):
        victim = ("all", *range(processes))[number % (processes + 1)] if processes > 1 else "all"
        victims.append(f"process {victim}" if victim != "all" else "all")
        places.append(_kill(homes[1], f"{line} --resume", victim, chance, took / count))
    _finish(_start(homes[1], f"{line} --resume"), line)
    return {
        "model": kind,
        "processes": str(processes),
        "kills": str(count),
        "killed": ", ".join(victims),
        "epoch.batch of the last checkpoint": ", ".join(places),
        "weights, metrics.csv, predictions": _same(homes[0] / "runs" / kind.lower(), homes[1] / "runs" / kind.lower()),
        "command": _typed(f"{line} --resume"),
    }


def _kill(folder: Path, line: str, victim: str | int, chance: random.Random, seconds: float) -> str:
    """Kill one process, or all, at a random moment after training has gone on; gives where the checkpoint stands then."""
    last = next(iter(folder.glob("runs/*/last.ckpt")), None)
    before = last.stat().st_mtime_ns if last else 0
    process = _start(folder, line)
    while not any(p.stat().st_mtime_ns != before for p in folder.glob("runs/*/last.ckpt")):
        if process.poll() is not None:
            raise RuntimeError(f"ehr {line}: ended before it could be killed\n{process.communicate()}")
        time.sleep(0.005)
    time.sleep(chance.uniform(0, seconds / 3))
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(_process(process.pid, int(victim)), signal.SIGKILL)
    said = process.communicate(timeout=60)
    if "Traceback" in said[1]:
        raise RuntimeError(f"ehr {line}: a traceback after kill -9 of process {victim}\n{said[1]}")
    limit = time.monotonic() + 20
    while _session(process.pid):
        if time.monotonic() > limit:
            raise RuntimeError(f"ehr {line}: a process was left after kill -9 of process {victim}")
        time.sleep(0.05)
    checkpoint = read(next(folder.glob("runs/*/last.ckpt")))
    within = checkpoint["callbacks"]["_Epochs"]["within"]
    return f"{checkpoint['epoch']}.{within['batch']}" if within else f"{checkpoint['epoch'] + 1}.0"


def _session(leader: int) -> dict[int, int]:
    """Local rank -> process id of what still runs in a session."""
    found = {}
    for path in Path("/proc").iterdir():
        try:
            if (
                path.name.isdigit()
                and os.getsid(int(path.name)) == leader
                and "Z" not in (path / "stat").read_text().rsplit(")", 1)[1][:3]
            ):
                set_by = [v for v in (path / "environ").read_text().split("\0") if v.startswith("LOCAL_RANK=")]
                found[int(set_by[0].split("=")[1]) if set_by else 0] = int(path.name)
        except OSError:
            continue
    return found


def _process(leader: int, rank: int) -> int:
    return leader if rank == 0 else _session(leader)[rank]


def _same(one: Path, other: Path) -> str:
    """ "bitwise equal", or the files that differ."""
    wrong = [
        n
        for n in ("metrics.csv", "metrics.json", "predictions.parquet")
        if (one / n).read_bytes() != (other / n).read_bytes()
    ]
    for name in ("best.ckpt", "last.ckpt"):
        mine, yours = (read(run / name)["state_dict"] for run in (one, other))
        if list(mine) != list(yours) or not all(torch.equal(mine[k], yours[k]) for k in mine):
            wrong.append(name)
    return f"DIFFERENT: {', '.join(wrong)}" if wrong else "bitwise equal"


# ---- memory of long stays ---------------------------------------------------------------------------------------------------


def recompute() -> Iterator[dict[str, str]]:
    """Time and memory of one training step with and without ``--model.recompute``, each in a process of its own."""
    for stays, length in ((32, 600), (6, 20_000)):
        kept = 0.0
        for flag in (0, 1):
            command = ["-m", "experiments.benchmarks.check_ranks", "--step", str(stays), str(length), str(flag)]
            with console.status(" ".join(command)):
                said = subprocess.run(
                    [sys.executable, *command],
                    check=True,
                    capture_output=True,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            megabytes, seconds = map(float, said.stdout.split())
            kept = kept or megabytes
            row = {"stays x observations": f"{stays} x {length:,}", "--model.recompute": "true" if flag else "false"}
            row |= {"peak MB": f"{megabytes:,.0f}", "of false": f"{megabytes / kept:.2f}", "seconds": f"{seconds:.1f}"}
            yield row | {"command": f"`python {' '.join(command)}`"}


def _step(stays: int, length: int, flag: int) -> None:
    """Print the peak memory of a training step above what the process held before, in MB, and its seconds."""
    torch.manual_seed(0)
    names = [f"v{i}" for i in range(60)]
    ones, zeros = [1.0] * 60, [0.0] * 60
    model = HyMaTE(
        width=64, layers=4, attention="variable", recompute=bool(flag), piecewise=False, summary=False, members=1
    )
    model.initialise(
        Spec(
            names,
            [""] * 60,
            ["age"],
            zeros,
            ones,
            [0.0],
            [1.0],
            {"name": "mortality_hospital", "hours": 48, "window": 48},
        ),
        1.0,
    )
    model.train()

    def batch(count: int, events: int) -> Triplets:
        shape = (count, events)
        time_of, variable = torch.linspace(-1, 1, events).repeat(count, 1), torch.randint(1, 61, shape)
        return Triplets(
            torch.randn(count, 1),
            torch.zeros(count, 0, 16),
            time_of,
            variable,
            torch.randn(shape),
            torch.full((count,), events),
            torch.ones(count),
            torch.arange(count),
        )

    model.training_step(batch(2, 50), 0).backward()
    model.zero_grad()
    long = batch(stays, length)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    model.training_step(long, 0).backward()
    spent = time.perf_counter() - begun
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, spent)


if __name__ == "__main__":
    main()
