"""A run directory: what a command resolved, what happened, and that only one command writes there.

``config.yaml`` holds the configuration with everything resolved, so that ``-c config.yaml`` is the same run again; its first
lines say on which code, device and data. ``run.log`` holds all that was printed.
"""

import functools
import inspect
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from filelock import FileLock, Timeout

from datamodules.module import ICUDataModule
from ehrmodels.base import ICUModule
from experiments import settings
from experiments.files import console, write_text

LOCK_SECONDS = 8  # a killed command's loader processes hold its lock for so long
FILES = ("config.yaml", "environment.txt", "metrics.csv", "wandb_id", "run.log")


def configuration(
    model: ICUModule | None, data: dict[str, ICUDataModule | None], trainer: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """All that a verb was told and what it made of it, in plain types: what ``config.yaml`` records.

    Args:
        model: to be trained; None: it comes from a checkpoint.
        data: argument of the verb -> its hospital system.
        trainer: arguments of lightning.Trainer, which are recorded where they are not its defaults.
        options: other arguments of the verb.
    """
    config: dict[str, Any] = {}
    if model is not None:
        config["model"] = _described(type(model), dict(model.hparams))
    for name, module in data.items():
        if module is not None:
            config[name] = _described(type(module), {**module.hparams, **module.options()}, "datamodules")  # type: ignore[attr-defined]
    defaults = inspect.signature(lightning.Trainer).parameters
    whole, always = {**settings.TRAINER_DEFAULTS, **trainer}, settings.TRAINER_DEFAULTS
    arguments = {k: v for k, v in whole.items() if k in always or k not in defaults or v != defaults[k].default}
    arguments["precision"] = precision(trainer)
    for name in ("callbacks", "logger"):
        if name in arguments:
            arguments[name] = _objects(arguments[name])
    plain = {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in options.items()
    }
    return {**config, "trainer": arguments, **_without_none(plain)}


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in options.items() if v is not None}


def precision(trainer: dict[str, Any]) -> str:
    """The precision that a training has: bfloat16 where there is a GPU and the user says nothing else."""
    on_gpu = torch.cuda.is_available() and trainer.get("accelerator") != "cpu"
    return str(trainer.get("precision") or ("bf16-mixed" if on_gpu else "32-true"))


def code() -> str:
    """Which code runs: the commit of its checkout, or the version that is installed."""
    version = metadata.version("ehr")
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return f"ehr {version}"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # no git on this machine
        return f"ehr {version}"
    return f"ehr {version}, commit {commit}" + (" with changes" if changed else "")


@contextmanager
def opened(
    folder: Path, config: dict[str, Any], resume: bool | None, option: str, verb: Callable[..., Any]
) -> Iterator[None]:
    """Make the run directory, or take up the one that is there; one in which nothing came to be trained is removed again.

    Args:
        folder: the run directory.
        config: as ``configuration`` gives it.
        resume: whether an unfinished run may be continued; None: it may, and nothing is said where there is none.
        option: the flag that names another directory, for messages.
        verb: the function that has the options, for their defaults.

    Raises:
        ValueError: the directory holds another run, or an unfinished one and ``resume`` is not set, or another command
            is at work there.
    """
    if console.quiet:  # one of several processes; the first has the directory
        yield
        return
    with _alone(folder, option):
        _take_up(folder, config, resume, option, verb)
        log = folder / "run.log"
        try:
            with console.logging_to(log):
                yield
        except Exception as error:
            if trained(folder):
                with suppress(OSError), log.open("a") as file:
                    file.write(f"ehr: {error}\n")
            else:
                _remove(folder)
            raise


def empty(folder: Path) -> None:
    """Let a run be trained anew: all goes but what was printed, and what it is known by at Weights & Biases."""
    with _alone(folder, "--name"):
        for path in folder.iterdir():
            if path.is_file() and path.name not in ("run.lock", "run.log", "wandb_id"):
                path.unlink()


@functools.cache
def _environment() -> str:
    """Versions of Python and of the installed packages, whose files are read once for all trainings of a process."""
    packages = sorted(f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions())
    return "\n".join([f"python=={platform.python_version()}", f"platform: {platform.platform()}", *packages]) + "\n"


def _take_up(folder: Path, config: dict[str, Any], resume: bool | None, option: str, verb: Callable[..., Any]) -> None:
    path = folder / "config.yaml"
    if path.exists():
        stored = yaml.safe_load(path.read_text())
        stored = stored if isinstance(stored, dict) else {}
        unequal = settings.differences(_from_here(stored), _from_here(config), verb)
        if unequal:
            raise ValueError(
                f"{folder} holds a run with another configuration ({path}):\n{settings.as_flags(unequal)}\n"
                f"choose another {option}, or delete the folder"
            )
        if resume is False and not (folder / "metrics.json").exists():
            raise ValueError(
                f"{folder} holds an unfinished run of this configuration; add --resume to continue it, or choose another {option}"
            )
        return
    if trained(folder):
        raise ValueError(
            f"{folder} holds a run without config.yaml, which another command wrote; choose another {option}, or delete the folder"
        )
    if resume:
        console.print(f"nothing to resume in {folder}: starting anew", soft_wrap=True)
    write_text(folder / "environment.txt", _environment())
    write_text(path, _yaml(config, {"code": code(), "device": device_name()}))


def _from_here(config: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of a configuration as seen from its run directory, which may have been moved together with it."""
    if "ckpt" not in config or "out" not in config:
        return config
    return {**config, "ckpt": os.path.relpath(config["ckpt"], config["out"])}


def record(folder: Path, facts: dict[str, Any]) -> None:
    """Add facts to the first lines of ``config.yaml``, which say what is no option."""
    if console.quiet:
        return
    path = folder / "config.yaml"
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith("# ") and line[2:].partition(":")[0] not in facts]
    body = [line for line in lines if not line.startswith("# ")]
    write_text(path, "\n".join([*head, *(f"# {k}: {v}" for k, v in facts.items()), *body]) + "\n")


def data_facts(data: ICUDataModule) -> dict[str, str]:
    """Which data a run read, for ``record``."""
    assert data.spec is not None
    splits = data.samples["split"].value_counts().sort("split").iter_rows()
    counts = ", ".join(f"{n:,} {split or 'in no split'}" for split, n in splits)
    return {
        "data": f"{len(data.store.minute):,} events of {len(data.store.stays):,} stays; store {data.store.folder.name}",
        "samples": f"{counts}; split {data.split_hash()}",
        "variables": ", ".join(data.spec.variables),
    }


def memory(device: torch.device) -> str:
    """Most memory that this process has taken so far, of a GPU where it has one and of the machine, in words."""
    taken = []
    if device.type == "cuda":
        most, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        taken.append(f"{most / 2**20:,.0f} of {whole / 2**20:,.0f} MiB of the GPU")
    with suppress(ImportError):
        import resource  # not on Windows

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        taken.append(f"{most / 2**20:,.0f} MiB of the machine")
    return "at most " + " and ".join(taken)


def device_name() -> str:
    """What a training runs on where the user says nothing else."""
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name(0)}" if count else f"CPU, {torch.get_num_threads()} threads"


def trained(folder: Path) -> bool:
    """Whether a run directory holds anything that was trained."""
    return any((folder / name).exists() for name in ("best.ckpt", "last.ckpt", "metrics.json"))


@contextmanager
def _alone(folder: Path, option: str) -> Iterator[None]:
    """The lock of a run directory, which the kernel frees when its command ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise ValueError(
            f"another command is at work in {folder}: wait until it has ended, or choose another {option}"
        ) from None
    try:
        yield
    finally:
        lock.release()
        if not (folder / "config.yaml").exists():  # nothing of ours is here
            (folder / "run.lock").unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def _remove(folder: Path) -> None:
    """Take away what a run that trained nothing has written."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _yaml(config: dict[str, Any], facts: dict[str, Any]) -> str:
    return "".join(f"# {k}: {v}\n" for k, v in facts.items()) + yaml.safe_dump(config, sort_keys=False)


def _described(kind: type, arguments: dict[str, Any], package: str = "") -> dict[str, Any]:
    values = {k: _plain(v) for k, v in arguments.items() if v is not None}
    return {"class_path": f"{package or kind.__module__}.{kind.__name__}", "init_args": values}


def _objects(value: Any) -> Any:
    """Callbacks and loggers as a configuration names them; of one that was made in Python only the class is told."""
    if isinstance(value, list | tuple):
        return [_objects(v) for v in value]
    if value is None or isinstance(value, bool | dict | str):
        return value
    return {"class_path": f"{type(value).__module__}.{type(value).__name__}"}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value) if isinstance(value, Path) else value
