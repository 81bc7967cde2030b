"""Two configurations compared by what they set: not as text, in which every new option of a release is a difference."""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any

TRAINER_DEFAULTS: dict[str, Any] = {  # where those of ``ehr`` are not lightning.Trainer's own
    "devices": 1,
    "max_epochs": 30,
    "gradient_clip_val": 1.0,
    "use_distributed_sampler": False,
}
IRRELEVANT = frozenset(  # what no result depends on: where things lie, and what is shown and kept on the way
    [
        *("runs", "name", "out", "config", "resume", "wandb", "checkpoint_minutes", "transfer.workers"),
        *(f"{data}.init_args.{name}" for data in ("data", "finetune") for name in ("cache", "num_workers", "resident")),
        *("trainer.log_every_n_steps", "trainer.default_root_dir", "trainer.detect_anomaly", "trainer.profiler"),
    ]
)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Nested sections as dotted keys, such as ``data.init_args.hours``."""
    return dict(_leaves("", config))


def _leaves(prefix: str, section: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _leaves(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def differences(
    stored: dict[str, Any], new: dict[str, Any], function: Callable[..., Any]
) -> dict[str, tuple[Any, Any]]:
    """What may change a result between two configurations: dotted key -> (stored, new).

    What only one of them sets counts as today's default in the other, so that an option that a release of this package or of Lightning
    adds is none. Options of another model or other data are not listed beside their class.

    Args:
        stored: the configuration of what was begun.
        new: the configuration of the command that would go on with it.
        function: the verb, whose signature has the defaults of the options at the top.
    """
    before, after = flat(stored), flat(new)
    for config in (before, after):
        if str(config.get("trainer.devices")).isdigit():
            config["trainer.devices"] = int(config["trainer.devices"])  # a flag is recorded as a word
    sections = {key.removesuffix(".class_path") for key in {*before, *after} if key.endswith(".class_path")}
    exchanged = [s for s in sections if not _same_class(before.get(f"{s}.class_path"), after.get(f"{s}.class_path"))]
    unequal: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*after, *before]):
        if key in IRRELEVANT or key.startswith("trainer.enable_"):
            continue
        section, _, option = key.rpartition(".")
        if option == "class_path":
            if section in exchanged:
                unequal[key] = (before.get(key), after.get(key))
            continue
        if any(key.startswith(f"{s}.") for s in exchanged):
            continue
        unset = [key not in c or (c[key] is None and ".init_args." in key) for c in (before, after)]
        default = _default(key, {**before, **after}, function) if any(unset) else None
        pair = (default if unset[0] else before[key], default if unset[1] else after[key])
        if pair[0] != pair[1]:
            unequal[key] = pair
    return unequal


def as_flags(differences: dict[str, tuple[Any, Any]]) -> str:
    """One line a difference, with flags as they are typed: ``  --model.width: 64 there, 32 here``."""
    lines = []
    for key, (stored, new) in differences.items():
        flag = key.replace(".init_args.", ".").removesuffix(".class_path")
        lines.append(f"  --{flag}: {_written(stored)} there, {_written(new)} here")
    return "\n".join(lines)


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return str(value)


def _same_class(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one.rpartition(".")[2] == other.rpartition(".")[2]


def _default(key: str, config: dict[str, Any], function: Callable[..., Any]) -> Any:
    """Today's default of an option; None, as for what is not used, where there is no such option today."""
    section, _, rest = key.partition(".init_args.")
    owners: tuple[Callable[..., Any], ...]
    if rest:
        owners = _class(config.get(f"{section}.class_path", "")).__mro__
        for kind in owners:  # a hospital resolves what is left out by a table of its own
            if rest in vars(kind).get("defaults", {}):
                return _plain(vars(kind)["defaults"][rest], [])
    elif key.startswith("trainer."):
        rest = key.removeprefix("trainer.")
        if rest in TRAINER_DEFAULTS:
            return TRAINER_DEFAULTS[rest]
        import lightning

        owners = (lightning.Trainer,)
    else:
        rest = key
        owners = (function,)
    name, *path = rest.split(".")
    for owner in owners:
        parameter = inspect.signature(owner).parameters.get(name) if owner is not object else None
        if parameter is not None and parameter.default is not parameter.empty:
            return _plain(parameter.default, path)
    return None


def _plain(value: Any, path: list[str]) -> Any:
    """A default as YAML holds it, or an entry within it."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return list(value) if isinstance(value, tuple) else value


def _class(path: str) -> type:
    """The class that a configuration names, whole or by its last part, among those that are loaded."""
    module, _, name = path.rpartition(".")
    named = getattr(sys.modules.get(module), name, None)
    if isinstance(named, type):
        return named
    from datamodules.module import ICUDataModule
    from ehrmodels.base import ICUModule

    waiting: list[type] = [ICUDataModule, ICUModule]
    while waiting:
        kind = waiting.pop()
        if kind.__name__ == name:
            return kind
        waiting += kind.__subclasses__()
    return object
